"""data.py: episodes survive the disk, damaged files are refused, transitions and batches by hand."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from batches import Batch, Mixture, collate, encode, micro_batches
from data import (
    LEVELS,
    Decision,
    Episode,
    Segment,
    Transition,
    Turn,
    read_episodes,
    transitions,
    write_episodes,
)
from progress import WINDOW, executor_prompt, planner_prompt, progress_prompt


def obs(i):
    return f"said {i}\n\nroom {i}\n\nbag {i}"


def make_episode(turns, segments=((0, 2), (2, 4)), **fields):
    """Turn i saw obs(i) and progress 'p<i>', played 'a<i>'; `turns` holds what else happened."""
    names = [
        next(f"goal {k}" for k, (start, end) in enumerate(segments) if start <= i < end)
        for i in range(len(turns))
    ]
    none = {"raw_text": "", "reward": 0.0, "terminated": False, "truncated": False}
    return Episode(
        "scienceworld", "melt", 3, "Your task is to melt.",
        [Turn(obs(i), f"a{i}", subtask=names[i], progress=f"p{i}", **none | t) for i, t in enumerate(turns)],
        [Segment(f"goal {k}", start, end, f"final {k}") for k, (start, end) in enumerate(segments)],
        final_obs=obs(len(turns)), **fields,
    )  # fmt: skip


VERIFIED = {"claimed_done": True, "verified_done": True}
WON = make_episode(
    [{"reward": 0.1}, {"reward": 0.2} | VERIFIED, {}, {"reward": 0.7, "terminated": True}],
    score=100,
    success=True,
)


def of(level, episode, **options):
    return [t for t in transitions(episode, **options) if t.level == level]


def flags(items):
    return [(t.reward, t.terminated, t.truncated) for t in items]


# --- files --------------------------------------------------------------------------------------------------
def test_episodes_survive_the_disk_and_appending_keeps_what_was_there(tmp_path):
    path = tmp_path / "new" / "folder" / "a.jsonl"
    sampled = dataclasses.replace(
        WON, decisions=[Decision("executor", 0, [5, 2], [-0.5, -1.25])], source="sft-1"
    )
    write_episodes(path, [WON])
    write_episodes(path, [sampled, make_episode([], segments=())], append=True)
    assert read_episodes(path) == [WON, sampled, make_episode([], segments=())]
    write_episodes(path, [sampled])
    assert read_episodes(path) == [sampled]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), reward=st.floats(allow_nan=False), score=st.integers(-100, 100))
def test_any_text_survives_the_disk(tmp_path, text, reward, score):
    turn = Turn(text, text, text, reward, False, True, text, text)
    episode = Episode(text, text, 0, text, [turn], [Segment(text, 0, 1, text)], text, score)
    write_episodes(tmp_path / "a.jsonl", [episode, episode])
    assert read_episodes(tmp_path / "a.jsonl") == [episode, episode]


def _without(record, *path):
    for key in path[:-1]:
        record = record[key]
    del record[path[-1]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(schema=0), "not an episode of schema 1; collect the file again"),
        (lambda r: _without(r, "schema"), "not an episode of schema 1; collect the file again"),
        (lambda r: _without(r, "final_obs"), "fields .* are not those of Episode .*; collect the file again"),
        (lambda r: r.update(extra=1), "fields .*'extra'.* are not those of Episode"),
        (lambda r: _without(r, "turns", 1, "claimed_done"), "turns: fields .* are not those of Turn"),
        (lambda r: _without(r, "segments", 0, "end"), "segments: fields .* are not those of Segment"),
        (
            lambda r: r.update(decisions=[{"level": "planner"}]),
            "decisions: fields .* are not those of Decision",
        ),
        (
            lambda r: r["segments"][1].update(start=3),
            "segments do not cover the 4 turns; annotate the file again",
        ),
        (lambda r: r["segments"][1].update(start=1), "segments do not cover the 4 turns"),
        (lambda r: r["segments"][1].update(end=3), "segments do not cover the 4 turns"),
        (lambda r: r["segments"][0].update(start=1), "segments do not cover the 4 turns"),
        (
            lambda r: r["segments"].append(r["segments"][1] | {"start": 4}),
            "segments do not cover the 4 turns",
        ),
    ],
)
def test_a_line_of_another_form_is_refused_with_file_line_and_fix(edit, message, tmp_path):
    path = tmp_path / "a.jsonl"
    write_episodes(path, [WON, WON])
    first, second = path.read_text().splitlines()
    record = json.loads(second)
    edit(record)
    path.write_text(f"{first}\n{json.dumps(record)}\n")
    with pytest.raises(
        ValueError, match=rf"a\.jsonl:2.*: {message}" if message[:3] == "not" else rf"a\.jsonl:2.*{message}"
    ):
        read_episodes(path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_damaged_line_is_refused_with_file_line_and_fix(keep, tmp_path):
    path = tmp_path / "a.jsonl"
    write_episodes(path, [WON, WON])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[: int(keep * len(second))]}\n")  # as a killed run leaves it
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: damaged JSON .*; delete this line and run collect\.py again"
    ):
        read_episodes(path)


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null"])
def test_a_line_that_is_no_object_is_refused(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not an episode of schema"):
        read_episodes(tmp_path / "a.jsonl")


def test_missing_file_is_an_error_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"no trajectories at .*none\.jsonl: make them with `python collect\.py --out"
    ):
        read_episodes(tmp_path / "none.jsonl")


# --- transitions by hand ------------------------------------------------------------------------------------
def test_planner_has_one_transition_per_segment_with_the_sum_of_its_rewards():
    first, second = of("planner", WON)
    assert first.reward == pytest.approx(0.3) and second.reward == pytest.approx(0.7)
    assert (first.steps, first.turn, second.steps, second.turn) == (2, 0, 2, 2)
    assert (first.terminated, first.truncated, second.terminated, second.truncated) == (
        False,
        False,
        True,
        False,
    )
    assert first.completion == " goal 0" and second.completion == " goal 1"
    assert first.prompt == planner_prompt(WON, 0, obs(0)) and second.prompt == planner_prompt(WON, 2, obs(2))
    assert first.next_prompt == second.prompt and second.next_prompt == ""


def test_executor_earns_by_verification_and_ends_with_the_subtask_or_the_world():
    items = of("executor", WON)
    assert flags(items) == [(0, False, False), (1, True, False), (0, False, False), (0, True, False)]
    assert [t.steps for t in items] == [1] * 4 and [t.turn for t in items] == [0, 1, 2, 3]
    assert [t.completion for t in items] == [" a0; False", " a1; True", " a2; False", " a3; False"]
    assert items[2].prompt == executor_prompt(WON, 2, 2, "goal 1", "p2", obs(2))
    assert [t.next_prompt for t in items] == [items[1].prompt, "", items[3].prompt, ""]


def test_progress_is_credited_like_its_action_and_absent_after_the_world_ended():
    items = of("progress", WON)
    assert flags(items) == [(0, False, False), (1, True, False), (0, False, False)]
    assert [t.completion for t in items] == [" p1", " final 0", " p3"]
    assert items[1].prompt == progress_prompt("goal 0", "p1", "a1", obs(2))
    after = progress_prompt("goal 1", "p3", "a3", obs(4))
    assert [t.next_prompt for t in items] == [items[1].prompt, "", after]


def test_a_false_claim_ends_the_option_without_reward():
    episode = make_episode([{}, {"claimed_done": True}, {}, {"terminated": True}])
    claim, first_of_next = of("executor", episode)[1:3]
    assert flags([claim]) == [(0, True, False)] and claim.next_prompt == ""
    assert flags(of("progress", episode))[1] == (0, True, False)
    planner = of("planner", episode)[0]
    assert (
        not planner.terminated
        and not planner.truncated
        and planner.next_prompt == of("planner", episode)[1].prompt
    )
    assert "goal 1" in first_of_next.prompt


def test_the_cap_on_actions_truncates_the_executor_alone_and_the_same_subtask_goes_on():
    episode = make_episode([{}, {}, {}, {"terminated": True}])
    capped = of("executor", episode)[1]
    assert flags([capped]) == [(0, False, True)]
    assert capped.next_prompt == executor_prompt(episode, 0, 2, "goal 0", "final 0", obs(2))
    planner = of("planner", episode)[0]
    assert flags([planner]) == [(0, False, False)]
    assert planner.next_prompt == planner_prompt(episode, 2, obs(2))


def test_the_step_limit_truncates_planner_and_executor_and_bootstraps_from_the_final_observation():
    episode = make_episode([{}, VERIFIED, {}, {"reward": 0.25, "truncated": True}])
    planner, executor = of("planner", episode)[-1], of("executor", episode)[-1]
    assert flags([planner]) == [(0.25, False, True)] and flags([executor]) == [(0, False, True)]
    assert planner.next_prompt == planner_prompt(episode, 4, obs(4)) and "said 4" in planner.next_prompt
    assert "final 1" in planner.next_prompt and "goal 0; goal 1" in planner.next_prompt
    assert executor.next_prompt == executor_prompt(episode, 2, 4, "goal 1", "final 1", obs(4))
    last = of("progress", episode)[-1]
    assert last.completion == " final 1" and last.next_prompt == ""


def test_verified_at_the_step_limit_terminates_the_executor_while_the_planner_is_truncated():
    episode = make_episode([{"truncated": True} | VERIFIED], segments=((0, 1),))
    assert flags(of("executor", episode)) == [(1, True, False)] and flags(of("planner", episode)) == [
        (0, False, True)
    ]


def test_verified_without_a_claim_rewards_and_terminates_in_the_middle_of_a_segment():
    episode = make_episode([{"verified_done": True}, {}, {}, {"terminated": True}])
    first, second = of("executor", episode)[:2]
    assert flags([first, second]) == [(1, True, False), (0, False, True)]
    assert first.next_prompt == "" and second.prompt == executor_prompt(episode, 0, 1, "goal 0", "p1", obs(1))


def test_an_episode_of_one_turn_has_one_decision_of_planner_and_executor():
    episode = make_episode([{"reward": -1.0, "terminated": True}], segments=((0, 1),))
    planner, executor = transitions(episode)
    assert (planner.level, executor.level) == ("planner", "executor")
    assert flags([planner, executor]) == [(-1, True, False), (0, True, False)]
    assert planner.next_prompt == executor.next_prompt == ""


def test_an_action_that_is_not_understood_costs_the_penalty_once():
    episode = make_episode([{}, VERIFIED, {}, {"terminated": True}])
    episode.turns[1].obs = "No known action matches that input.\n\nroom 1\n\nbag 1"
    episode.final_obs = "Nothing happens\n\nroom 4\n\nbag 4"
    rewards = [t.reward for t in of("executor", episode, invalid_penalty=0.25)]
    assert rewards == [-0.25, 1, 0, -0.25]
    assert [t.reward for t in of("executor", episode)] == [0, 1, 0, 0]
    assert [t.reward for t in of("progress", episode, invalid_penalty=0.25)] == rewards[:3]
    assert [t.reward for t in of("planner", episode, invalid_penalty=0.25)] == [0, 0]


@pytest.mark.parametrize("history", ["full", "window"])
def test_without_a_progress_policy_there_are_no_progress_transitions(history):
    items = transitions(WON, history)
    assert [t.level for t in items] == ["planner", "executor", "executor"] * 2
    assert not any("p1" in t.prompt or "final" in t.prompt for t in items)
    assert flags(items) == flags([t for t in transitions(WON) if t.level != "progress"])


def test_an_episode_without_subtasks_is_refused_with_the_fix():
    episode = dataclasses.replace(WON, segments=[])
    with pytest.raises(ValueError, match="expert/melt/3 has no subtasks: annotate it first"):
        transitions(episode)


def test_transitions_leave_the_episode_unchanged():
    before = json.dumps(dataclasses.asdict(WON))
    transitions(WON, "full", 0.5)
    assert json.dumps(dataclasses.asdict(WON)) == before


# --- history modes ------------------------------------------------------------------------------------------
def memory(prompt):
    return prompt.split("\n", 2)[2].partition("\nObservation:")[0]


def test_history_modes_of_the_planner_by_hand():
    episode = make_episode([{}] * 12, segments=tuple((2 * k, 2 * k + 2) for k in range(6)))
    assert memory(planner_prompt(episode, 0, obs(0))) == "Finished: none\nProgress: None"
    assert memory(planner_prompt(episode, 0, obs(0), "full")) == "History: none"
    assert memory(planner_prompt(episode, 4, obs(4))) == "Finished: goal 0; goal 1\nProgress: final 1"
    lines = [f"goal {k}: a{2 * k}, a{2 * k + 1}. said {2 * k + 2}" for k in range(6)]
    assert memory(planner_prompt(episode, 12, obs(12), "full")) == "History: " + "\n".join(lines)
    assert memory(planner_prompt(episode, 12, obs(12), "window")) == "History: " + "\n".join(lines[-WINDOW:])


def test_history_modes_of_the_executor_by_hand():
    episode = make_episode([{}] * 9, segments=((0, 2), (2, 9)))
    start_of = {
        mode: executor_prompt(episode, 2, 2, "goal 1", "p2", obs(2), mode)
        for mode in ("progress", "full", "window")
    }
    assert {mode: memory(p) for mode, p in start_of.items()} == {
        "progress": "Progress: p2", "full": "History: none", "window": "History: none",
    }  # fmt: skip
    assert memory(executor_prompt(episode, 2, 8, "goal 1", "p8", obs(8))) == "Progress: p8"
    lines = [f"said {i} > a{i}" for i in range(2, 8)]
    assert memory(executor_prompt(episode, 2, 8, "goal 1", "p8", obs(8), "full")) == "History: " + "\n".join(
        lines
    )
    for t, shown in [(8, lines[-WINDOW:]), (4, lines[:2])]:  # a window never reaches into the subtask before
        window = memory(executor_prompt(episode, 2, t, "goal 1", f"p{t}", obs(t), "window"))
        assert window == "History: " + "\n".join(shown)


# --- tokens -------------------------------------------------------------------------------------------------
WORDS = {
    word: i
    for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"one two three four five six".split()])
}


def make_tokenizer(**special):
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def item(prompt, completion="", ids=(), next_prompt="", level="executor", **fields):
    defaults = {"reward": 0.0, "steps": 1, "terminated": next_prompt == "", "truncated": False}
    return Transition(level, prompt, completion, list(ids), [], **defaults | fields, next_prompt=next_prompt,
                      source="s", episode_id="e", turn=0)  # fmt: skip


def test_prompt_has_one_bos_and_the_completion_its_eos():
    assert encode(make_tokenizer(), "one two", "three") == ([1, 4, 5], [6, 2])
    assert encode(make_tokenizer(bos_token=None), "one two", "three") == ([4, 5], [6, 2])


def test_sampled_ids_are_used_as_they_are_and_never_encoded_again():
    assert encode(make_tokenizer(), "one", "two", [9, 9]) == ([1, 4], [9, 9])  # cut: no EOS is added
    ids = {("planner", 0): [7, 2], ("executor", 1): [8, 2], ("progress", 1): [9, 9]}
    sampled = [Decision(level, turn, row, [-1.0] * 2) for (level, turn), row in ids.items()]
    for t in transitions(dataclasses.replace(WON, decisions=sampled)):
        assert t.completion_ids == ids.get((t.level, t.turn), [])
        assert t.behavior_logprobs == ([-1.0] * 2 if (t.level, t.turn) in ids else [])
    batch = collate([item("one", "two", [9, 0])], make_tokenizer())
    assert batch.input_ids.tolist() == [[1, 4, 9, 0]]


def test_the_sampled_text_is_the_completion_even_when_it_could_not_be_parsed():
    episode = make_episode([{"raw_text": " a0 and so on", "terminated": True}], segments=((0, 1),))
    assert of("executor", episode)[0].completion == " a0 and so on"


def test_collate_by_hand():
    items = [
        item("one two three", "four", next_prompt="five six", level="planner", reward=0.5, steps=3),
        item("one", "two two two", reward=1.0),
    ]
    batch = collate(items, make_tokenizer())
    yes, no = True, False
    assert batch.input_ids.tolist() == [[1, 4, 5, 6, 7, 2], [1, 4, 5, 5, 5, 2]]
    assert batch.attention_mask.tolist() == [[yes] * 6] * 2
    assert batch.action_mask.tolist() == [[no, no, no, no, yes, yes], [no, no, yes, yes, yes, yes]]
    assert batch.state_index.tolist() == [3, 1] and batch.action_index.tolist() == [5, 5]
    assert batch.next_ids.tolist() == [[1, 8, 9], [1, 0, 0]]
    assert batch.next_mask.tolist() == [[yes] * 3, [yes, no, no]] and batch.next_index.tolist() == [2, 0]
    assert batch.level.tolist() == [LEVELS.index("planner"), LEVELS.index("executor")]
    assert batch.reward.tolist() == [0.5, 1.0] and batch.steps.tolist() == [3, 1]
    assert batch.terminated.tolist() == [False, True]
    assert batch.attention_mask.dtype == batch.action_mask.dtype == batch.terminated.dtype == torch.bool


def test_collate_masks_come_from_lengths_even_when_padding_is_eos():
    for tokenizer in (make_tokenizer(pad_token="<eos>"), make_tokenizer(pad_token=None)):
        batch = collate([item("one", ids=[2, 5, 2]), item("one two three four", ids=[5])], tokenizer)
        assert batch.input_ids.tolist() == [[1, 4, 2, 5, 2, 2], [1, 4, 5, 6, 7, 5]]
        assert batch.attention_mask.sum(1).tolist() == [5, 6] and batch.action_mask.sum(1).tolist() == [3, 1]
        assert batch.action_mask[0].tolist() == [False, False, True, True, True, False]


def test_collate_without_bos_gives_a_terminated_decision_one_stand_in_token():
    batch = collate([item("one", "two")], make_tokenizer(bos_token=None))
    assert batch.next_ids.tolist() == [[2]] and batch.next_index.tolist() == [0]


def test_split_gives_the_same_rows_in_order():
    batch = collate(
        [item("one two"[: 3 + 4 * (i % 2)], "three", reward=float(i)) for i in range(5)], make_tokenizer()
    )
    parts = batch.split(2)
    assert [len(part.reward) for part in parts] == [2, 2, 1]
    for field in dataclasses.fields(Batch):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(batch, field.name))


def test_micro_batches_hold_every_decision_once_and_stay_below_the_limit():
    items = [item("one " * (1 + 7 * i % 11), ids=[4] * (i % 3 + 1), reward=float(i)) for i in range(20)]
    items += items[:3]  # the same decision drawn twice
    groups = micro_batches(items, make_tokenizer(), max_tokens=30)
    assert sorted(t.reward for group in groups for t in group) == sorted(t.reward for t in items)
    sizes = [collate(group, make_tokenizer()).input_ids.shape for group in groups]
    assert max(rows * width for rows, width in sizes) <= 30 and len(groups) < len(items)


def test_a_decision_longer_than_the_limit_is_a_micro_batch_of_its_own():
    groups = micro_batches([item("one two"), item("one " * 50), item("one")], make_tokenizer(), max_tokens=20)
    assert [len(group) for group in groups] == [2, 1]


# --- sampling -----------------------------------------------------------------------------------------------
POOLS = {name: [item(f"{name} {i}") for i in range(count)] for name, count in [("expert", 5), ("rollout", 7)]}


def drawn(mixture, *sizes):
    return [t.prompt for size in sizes for t in mixture.batch(size)]


def test_mixture_keeps_one_to_two_exactly():
    names = [p.split()[0] for p in drawn(Mixture(POOLS, {"expert": 1, "rollout": 2}, seed=0), *[7] * 30)]
    for n in range(3, 211, 3):
        assert names[:n].count("expert") == n // 3


def test_mixture_walks_every_pool_whole_before_it_repeats_and_reshuffles():
    draws = drawn(Mixture(POOLS, {"expert": 1, "rollout": 2}, seed=0), 60)
    experts = [p for p in draws if p.startswith("expert")]
    rounds = [experts[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(r) == sorted(t.prompt for t in POOLS["expert"]) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_mixture_is_seeded():
    a, b, c = (drawn(Mixture(POOLS, {"expert": 1, "rollout": 2}, seed), 30) for seed in (0, 0, 1))
    assert a == b != c


def test_mixture_resumes_exactly():
    whole = drawn(Mixture(POOLS, {"expert": 1, "rollout": 2}, seed=3), *[4] * 20)
    first, second = (Mixture(POOLS, {"expert": 1, "rollout": 2}, seed=3) for _ in range(2))
    begin = drawn(first, *[4] * 9)
    state = first.state_dict()
    first.batch(4)  # the state is a copy
    second.load_state_dict(json.loads(json.dumps(state)))
    assert begin + drawn(second, *[4] * 11) == whole


def test_mixture_refuses_an_empty_pool_unless_its_ratio_is_zero():
    for pools in ({"expert": POOLS["expert"], "rollout": []}, {"expert": POOLS["expert"]}):
        with pytest.raises(
            ValueError, match=r"no transitions in \['rollout'\]: collect them first or set their ratio to 0"
        ):
            Mixture(pools, {"expert": 1, "rollout": 2}, seed=0)
        draws = drawn(Mixture(pools, {"expert": 1, "rollout": 0}, seed=0), 10)
        assert len(draws) == 10 and all(p.startswith("expert") for p in draws)
