"""The report page: numbers arrive, texts are escaped, every episode can be reached, nothing is fetched."""

import json
import re
from html.parser import HTMLParser

import pytest

import plot
from data import Episode, Segment, Turn, write_episodes
from diagnostics import QUANTILES
from plot import MANY, Config, drawn, page, read_metrics, result_table
from viewer import ending, pick

EVIL = '<script>alert("x")</script> & $title'


def result(agent: str, stage: str, score: float, **changes) -> dict:
    return {
        "benchmark": "scienceworld", "panel": "demo", "split": "dev", "agent": agent, "stage": stage,
        "checkpoint": f"out/{stage}", "seeds": [0], "episodes": 40, "max_steps": 50, "macro_mean": score,
        "ci95": [score - 3.25, score + 4.5], "success_rate": 0.125, "success_ci95": [0.05, 0.26],
        "per_type": {"melt": {"mean": 17.25, "episodes": 5, "success": 0.2}},
        "tokens_per_decision": {"planner": {"prompt": 212.3, "completion": 8.1}}, "tokens_per_step": 271.4,
        "parse_failure_rate": 0.031, "command": f"python eval.py --name {agent}", "commit": "0123456789ab",
        "hardware": "2 x Some CPU", "minutes": 3.2,
    } | changes  # fmt: skip


SUBTASKS = {
    "ends": "claim", "count": 40, "mean_length": 3.04,
    "agreement": 0.775, "precision": 0.8125, "recall": None,
    "ended_by": {"claim": 26, "judge": 0, "cap": 4, "limit": 8, "world": 2},
}  # fmt: skip


def write_result(folder, name: str, **changes) -> None:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / f"{name}.json").write_text(json.dumps(result(name, "orl", 12.5, **changes)))


def write_metrics(folder, metrics: dict[str, list[float]]) -> None:
    """metrics.csv as run.Run.log writes it: all metrics of a step, then those of the next."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{i + 1},{name},{values[i]}" for i in range(80) for name, values in metrics.items()]
    (folder / "metrics.csv").write_text("\n".join(["step,metric,value", *rows, ""]))


def section(text: str, start: str, end: str) -> str:
    """The page from one string to another, without its drawings."""
    found = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    return found[found.index(start) : found.index(end, found.index(start) + len(start))]


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the table below a title."""
    _, *rows = section(text, title, "</table>").split("<tr>")
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.split("<t[dh]>", row)[1:]] for row in rows]


def episode(task: str = "melt", variation: int = 0, **changes) -> Episode:
    """Two subtasks: the first claimed and verified, the second cut by the step limit."""
    turns = [
        Turn("start\n\nroom\n\nbag", "open door", " open door; False", 0.0, False, False, "go out", "None"),
        Turn(
            "door open\n\nroom\n\nbag",
            "go out",
            " go out; True",
            0.5,
            False,
            False,
            "go out",
            "Door open.",
            True,
            True,
        ),
        Turn("outside\n\nyard\n\nbag", EVIL, "no answer", 0.0, False, True, "look", "None"),
    ]
    segments = [Segment("go out", 0, 2, "In the yard."), Segment("look", 2, 3, "Saw nothing.")]
    fields = {"turns": turns, "segments": segments, "final_obs": f"{EVIL}\n\nyard\n\nbag", "score": 50.0}
    return Episode("scienceworld", task, variation, f"Your task: {EVIL}", **(fields | changes))


@pytest.fixture
def run(tmp_path):
    """A folder as demo.py leaves it: two agents, two training runs, episodes."""
    folder = tmp_path / "demo"
    (folder / "results").mkdir(parents=True)
    for record in (result("offline RL", "orl", 38.9), result("random", "random", 4.1)):
        (folder / "results" / f"{record['stage']}.json").write_text(json.dumps(record))
        played = [episode(task, variation) for task in ("melt", "boil") for variation in range(10)]
        write_episodes(folder / "episodes" / f"{record['stage']}.jsonl", played)
    for name, metrics in (
        ("sft", ["train/loss"]),
        ("orl", ["executor/q_loss", "planner/q_loss", "own/thing"]),
    ):
        (folder / name).mkdir()
        rows = [f"{step},{metric},{1 / (step + 1)}" for step in range(80) for metric in metrics]
        (folder / name / "metrics.csv").write_text("\n".join(["step,metric,value", *rows, ""]))
    (folder / "sft" / "config.json").write_text(
        json.dumps({"seed": 7, "provenance": {"command": "python train_sft.py"}})
    )
    return folder


class Outline(HTMLParser):
    """Ids, options, script count and tag balance of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.articles, self.visible, self.options, self.links, self.scripts = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.scripts += tag == "script"
        if tag == "article":
            self.articles.append(attrs["id"])
            self.visible += [] if "hidden" in attrs else [attrs["id"]]
        if tag == "option":
            self.options.append(attrs["value"])
        if tag == "a":
            self.links.append(attrs["href"].removeprefix("#"))


def test_the_numbers_of_the_results_are_on_the_page_untrained_agents_first(run):
    text = page(Config(run))
    for number in (
        "38.9",
        "[35.6, 43.4]",
        "12.5%",
        "271",
        "17.2",
        "python eval.py --name random",
        "0123456789ab",
    ):
        assert number in text
    assert text.index(">random<") < text.index(">offline RL<")
    assert "python train_sft.py" in text


def test_text_table_is_aligned_and_has_one_block_per_panel():
    rows = [
        result("random", "random", 4.1),
        result("offline RL", "orl", 38.9, panel="full", tokens_per_step=9.0),
    ]
    first, second = result_table(rows).split("\n\n")
    assert first.splitlines() == [
        "scienceworld, panel demo, split dev, 50 steps",
        "agent   score  95% interval  success  episodes  tokens/step",
        "-----------------------------------------------------------",
        "random    4.1    [0.8, 8.6]    12.5%        40          271",
    ]
    assert second.startswith("scienceworld, panel full") and second.endswith("          9")


def test_every_text_from_a_file_is_escaped(run):
    (run / "results" / "evil.json").write_text(json.dumps(result(EVIL, EVIL, 1.0, command=EVIL, per_type={})))
    text = page(Config(run))
    assert Outline(text).scripts == 1  # plot.html's own
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; $title" in text


def test_every_episode_shown_is_reachable_and_one_is_visible(run):
    seen = Outline(page(Config(run, episodes=12)))
    assert len(seen.articles) == 24 and seen.options == seen.articles
    assert set(seen.links) == set(seen.articles)  # each is linked from the same episode of the other agent
    assert seen.visible == ["ep-1-0"]


def test_the_viewer_tells_progress_action_feedback_reward_and_how_subtasks_ended(run):
    text = page(Config(run))
    for part in (
        "Door open.",
        "<code>go out</code>",
        "outside",
        "reward +0.50",
        "says done",
        "verified done",
    ):
        assert part in text
    for part in ("claimed done", "step limit", "not parsed", "In the yard.", "Final score 50"):
        assert part in text


@pytest.mark.parametrize(
    "last, success, expected",
    [
        ({"claimed_done": True, "verified_done": True}, False, ["claimed done", "verified"]),
        ({"claimed_done": True}, False, ["claimed done", "not verified"]),
        ({}, False, ["cap on actions", "not verified"]),
        ({"truncated": True, "claimed_done": True}, False, ["step limit", "not verified"]),
        ({"terminated": True}, False, ["world: ended", "not verified"]),
        ({"terminated": True, "verified_done": True}, True, ["world: solved", "verified"]),
    ],
)
def test_how_a_subtask_ended(last, success, expected):
    turn = Turn("o", "a", "", 0.0, **({"terminated": False, "truncated": False} | last))
    played = episode(turns=[turn], segments=[Segment("s", 0, 1, "")], success=success)
    assert re.findall(r">([^<]+)</span>", ending(played, played.segments[0])) == expected


def test_an_ending_knows_what_could_end_a_subtask():
    def said(ends, **last):
        turn = Turn("o", "a", "", 0.0, terminated=False, truncated=False, **last)
        played = episode(turns=[turn], segments=[Segment("s", 0, 1, "")])
        return re.findall(r">([^<]+)</span>", ending(played, played.segments[0], ends))[0]

    claim = {"claimed_done": True, "verified_done": True}
    assert said("claim", **claim) == "claimed done" and said("judge", **claim) == "judged done"
    assert said("cap", **claim) == "cap on actions"


def test_an_agent_without_subtasks_is_shown_flat(run):
    write_episodes(run / "episodes" / "random.jsonl", [episode(segments=[])])
    assert "3 steps, 0 subtasks" in page(Config(run))


def test_the_choice_of_episodes_is_the_same_for_all_agents_and_blind_to_the_score():
    played = [
        episode(t, v, score=s)
        for s, (t, v) in enumerate([("melt", 3), ("boil", 2), ("boil", 9), ("melt", 1)])
    ]
    assert [(e.task, e.variation) for e in pick(played[::-1], 3)] == [("boil", 2), ("melt", 1), ("boil", 9)]
    assert pick(played, 9) == pick(played[::-1], 9)


def test_the_page_asks_for_nothing_from_outside(run):
    text = page(Config(run))
    assert not re.search(r"""https?://|url\((?!#)|@import|<link|<iframe|\bsrc=|xlink:href="[^#]""", text)
    assert "default-src 'none'" in text


def test_a_chart_has_a_line_per_level_and_no_id_that_changes_between_runs(run):
    text = page(Config(run))
    assert text.count("<figure>") == 3  # loss, q_loss of two levels, thing
    assert ">planner</text>" in text and ">executor</text>" in text
    assert text == page(Config(run))


def test_the_page_needs_neither_metrics_nor_episodes(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(result("a", "sft", 1.0)))
    text = page(Config(tmp_path))
    assert "No metrics.csv" in text and "no episodes in this folder" in text


def test_metrics_keep_nan_and_refuse_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,metric,value\n1,planner/q_loss,nan\n2,planner/q_loss,0.5\n")
    assert read_metrics(path)["q_loss"]["planner"][1] == (2, 0.5)
    path.write_text("step,metric,value\n1,planner/q_loss\n")
    with pytest.raises(ValueError, match=r"metrics.csv:2: '1,planner/q_loss' is not .*delete the line"):
        read_metrics(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no results in .*make demo"),
        ("{", "damaged JSON .*eval.py command again"),
        ("3", "damaged JSON .*eval.py command again"),
        ('{"agent": "x"}', r"fields \['benchmark', .* are missing: run its eval.py"),
    ],
)
def test_missing_inputs_are_one_line_with_the_fix(content, message, tmp_path):
    (tmp_path / "results").mkdir()
    if content is not None:
        (tmp_path / "results" / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        page(Config(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no folder .*make demo"):
        page(Config(tmp_path / "absent"))


def test_main_writes_the_page_and_prints_the_table(run, capsys):
    plot.main(Config(run))
    assert (run / "report.html").read_text() == page(Config(run))
    assert "offline RL" in capsys.readouterr().out


# --- how an agent plays -----------------------------------------------------------------------------------
def test_the_table_of_subtasks_tells_how_they_end_in_percent(tmp_path):
    write_result(tmp_path, "a", subtasks=SUBTASKS)
    assert table(page(Config(tmp_path)), "How subtasks end") == [
        "agent,subtasks,mean length,claim,judge,cap,limit,world,agreement,precision,recall".split(","),
        "a,40,3.0,65%,0%,10%,20%,5%,78%,81%,–".split(","),
    ]


def test_results_without_subtasks_are_left_out_of_their_table(tmp_path):
    write_result(tmp_path, "older", capped_subtasks=3)
    write_result(tmp_path, "random", subtasks=SUBTASKS | {"count": 0})
    assert "How subtasks end" not in page(Config(tmp_path))
    write_result(tmp_path, "new", subtasks=SUBTASKS)
    assert [row[0] for row in table(page(Config(tmp_path)), "How subtasks end")] == ["agent", "new"]


def test_the_table_of_tokens_is_by_role_with_the_answers_not_parsed(tmp_path):
    roles = {"planner": {"prompt": 212.3, "completion": 8.1}, "executor": {"prompt": 99.6, "completion": 6.5}}
    write_result(tmp_path, "a", tokens_per_decision=roles)
    write_result(tmp_path, "random", tokens_per_decision={}, parse_failure_rate=0)
    assert table(page(Config(tmp_path)), "Tokens per decision") == [
        ["agent", "planner", "executor", "progress", "not parsed"],
        ["a", "212 + 8", "100 + 6", "–", "3.1%"],
        ["random", "–", "–", "–", "0.0%"],
    ]


def test_an_evaluation_that_went_wrong_has_an_alarm_and_a_good_one_has_none(tmp_path):
    write_result(tmp_path, "good", subtasks=SUBTASKS)
    assert 'class="alarm"' not in page(Config(tmp_path))
    write_result(tmp_path, "bad", subtasks=SUBTASKS | {"precision": 0.3}, parse_failure_rate=0.4)
    found = re.findall(r'class="alarm">([^<]+)<', page(Config(tmp_path)))
    assert [text[:40] for text in found] == [
        "bad: 40% of the executor&#x27;s answers ",
        "bad: the judge confirms only 30% of the ",
    ]


# --- how a run trains -------------------------------------------------------------------------------------
def test_the_alarms_of_a_run_stand_above_its_curves(tmp_path):
    write_result(tmp_path, "a")
    write_metrics(tmp_path / "calm", {"planner/ess_share": [0.9] * 80, "planner/value_mean": [0.3] * 80})
    write_metrics(tmp_path / "wild", {"planner/ess_share": [0.9] * 40 + [0.02] * 40})
    text = page(Config(tmp_path))
    calm, wild = section(text, "<h3>calm", "</figure>"), section(text, "<h3>wild", "<figure>")
    assert "no alarms" in calm and 'class="alarm"' not in calm
    assert "planner ess_share 0.02: under a tenth of the decisions" in wild and "no alarms" not in wild


def quantiles(middle: float) -> dict[str, list[float]]:
    """advantage_p05 ... p95 of two levels: the median at `middle`, 0.1 from one to the next."""
    return {
        f"{level}/advantage_p{p:02d}": [middle + 0.1 * (k - 2)] * 80
        for level in ("planner", "executor")
        for k, p in enumerate(QUANTILES)
    }


def test_five_quantiles_are_one_chart_with_a_band_per_level(tmp_path):
    write_result(tmp_path, "a")
    write_metrics(tmp_path / "orl", quantiles(0.5) | {"planner/weight_p50": [1.0] * 80})
    text = page(Config(tmp_path))
    assert re.findall(r"<figcaption><b>(\w+)</b>", text) == ["advantage", "weight_p50"]  # p50 alone: a line
    advantage = text[text.index("<b>advantage</b>") : text.index("<b>weight_p50</b>")]
    bands = re.findall(r'<g id="FillBetweenPolyCollection.*?<path[^>]* d="([^"]+)"', advantage, re.DOTALL)
    ys = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", band)] for band in bands]
    light, dark, *other = [max(y) - min(y) for y in ys]
    assert light == pytest.approx(2 * dark) and other == pytest.approx([light, dark])  # of two levels
    assert "<b>advantage</b> Q - V: median" in text


def test_the_bands_hold_the_quantiles_in_order(tmp_path):
    write_metrics(tmp_path, quantiles(0.5))
    charts = drawn(read_metrics(tmp_path / "metrics.csv"))
    assert list(charts) == ["advantage"] and list(charts["advantage"]) == ["planner", "executor"]
    assert charts["advantage"]["executor"].shape == (80, 6)
    assert charts["advantage"]["planner"][-1].tolist() == pytest.approx([80, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_a_step_of_a_run_that_is_still_going_on_may_lack_its_last_quantiles(tmp_path):
    write_metrics(tmp_path, quantiles(0.5))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text().rsplit("\n", 3)[0] + "\n")  # executor p75 and p95 of step 80
    charts = drawn(read_metrics(path))["advantage"]
    assert charts["planner"].shape == (80, 6) and charts["executor"].shape == (79, 6)


def test_a_run_logged_before_ess_share_still_draws(tmp_path):
    write_result(tmp_path, "a", capped_subtasks=3)
    write_metrics(
        tmp_path / "orl", {"planner/ess": [0.9 + i for i in range(80)], "planner/v_loss": [0.1] * 80}
    )
    text = page(Config(tmp_path))
    assert re.findall(r"<figcaption><b>(\w+)</b>", text) == ["v_loss", "ess"] and "no alarms" in text


def test_many_runs_fold_their_curves_and_show_their_alarms(tmp_path):
    for arm in range(MANY):
        write_metrics(tmp_path / f"arm {arm}", {"planner/q_loss": [0.1] * 80})
        write_result(tmp_path, f"arm {arm}")
    text = page(Config(tmp_path))
    assert text.count("<figure>") == MANY and "curves</summary>" not in text
    write_metrics(tmp_path / "seed1" / "arm <9>", {"planner/ess_share": [0.01] * 80})  # two folders down
    (tmp_path / "seed1" / "arm <9>" / "config.json").write_text("{}")
    text = page(Config(tmp_path))
    assert text.count("<details><summary>1 curves</summary>") == text.count("<figure>") == MANY + 1
    last = section(text, "<h3>seed1/arm &lt;9&gt;", "<details>")
    assert 'class="alarm"' in last and "seed1/arm &lt;9&gt; (training)" in text
