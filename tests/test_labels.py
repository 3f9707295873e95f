"""labels.py: the checks find planted faults, leaks and ambiguity by hand, the command line."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from test_annotate import small_episode

from annotate import annotate
from data import Episode, write_episodes
from labels import ambiguity, check, leaks
from scienceworld_rules import MAX_ACTIONS

ROOT = Path(__file__).parent.parent


# --- check ------------------------------------------------------------------------------------------------
def _rename(episode: Episode, segment: int, name: str) -> None:
    s = episode.segments[segment]
    s.subtask = name
    for turn in episode.turns[s.start : s.end]:
        turn.subtask = name


FAULTS = {
    "a subtask names an unseen thing": (
        lambda e: _rename(e, 1, "get the unicorn"),
        "has not seen ['unicorn']",
    ),
    "a subtask looks ahead": (lambda e: _rename(e, 0, "explore the cupboard"), "has not seen ['cupboard']"),
    "progress names an unseen thing": (
        lambda e: setattr(e.turns[1], "progress", "the unicorn is open."),
        "['unicorn']",
    ),
    "progress leaks the future": (
        lambda e: setattr(e.turns[2], "progress", "in the kitchen, cupboard."),
        "['cupboard']",
    ),
    "progress not by the rules": (
        lambda e: setattr(e.turns[2], "progress", "in the kitchen now."),
        "not progress_text",
    ),
    "progress is missing": (lambda e: setattr(e.segments[1], "final_progress", ""), "not progress_text"),
    "groups overlap": (lambda e: setattr(e.segments[1], "start", 2), "do not follow"),
    "groups leave a gap": (lambda e: setattr(e.segments[0], "end", 2), "do not follow"),
    "groups end too early": (lambda e: e.segments.pop(), "cover 5 of 6"),
    "a turn carries another subtask": (lambda e: setattr(e.turns[1], "subtask", "wait"), "does not carry"),
    "the last action is not claimed": (
        lambda e: setattr(e.turns[3], "claimed_done", False),
        "does not carry",
    ),
    "a verdict is invented": (lambda e: setattr(e.turns[0], "verified_done", True), "does not carry"),
    "a subtask is not complete at its end": (
        lambda e: _rename(e, 1, "focus on the thermometer"),
        "not complete at its end",
    ),
    "a subtask is complete before its end": (
        lambda e: _rename(e, 0, "go to the kitchen"),
        "complete already",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_catches(fault):
    episode = annotate(small_episode())
    plant, expected = FAULTS[fault]
    plant(episode)
    assert any(expected in problem for problem in check(episode)), check(episode)


def test_check_catches_a_group_above_the_cap():
    episode = annotate(small_episode())
    turn = episode.turns[3]
    episode.turns[3:4] = [copy.deepcopy(turn) for _ in range(MAX_ACTIONS + 1)]
    episode.segments[1].end += MAX_ACTIONS
    episode.segments[2].start += MAX_ACTIONS
    episode.segments[2].end += MAX_ACTIONS
    assert any(f"with 1 to {MAX_ACTIONS} actions" in problem for problem in check(episode))


def test_another_teachers_wording_passes_only_without_the_rules():
    episode = annotate(small_episode())
    episode.turns[1].progress = "Opened the door to the kitchen."
    assert check(episode, by_rules=False) == [] and len(check(episode)) == 1


def test_leaks_are_found_between_episodes():
    one, other = annotate(small_episode()), annotate(small_episode())
    assert leaks([one, other]) == []
    other.turns[2].progress = "Soon there will be a pot."
    assert len(leaks([one, other])) == 1


def test_ambiguity_by_hand():
    one, two, three = (annotate(small_episode()) for _ in range(3))
    assert ambiguity([one, two], "executor") == ambiguity([one, two], "planner") == 0
    three.turns[3].action = "focus on thermometer"  # 1 of 18 actions differs from the majority
    _rename(three, 2, "get the metal pot")  # 1 of 12 subtasks; its turn becomes a prompt of its own
    assert ambiguity([one, two, three], "executor") == pytest.approx(1 / 18)
    assert ambiguity([one, two, three], "planner") == pytest.approx(1 / 12)


# --- command line -----------------------------------------------------------------------------------------
def run(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "labels.py", str(path)], cwd=ROOT, capture_output=True, text=True)


def test_command_line_reports_per_type_and_fails_on_problems(tmp_path):
    good, bad = small_episode(), small_episode()
    write_episodes(tmp_path / "good.jsonl", [good])
    done = run(tmp_path / "good.jsonl")
    assert done.returncode == 0 and "toy" in done.stdout and "100.00%" in done.stdout, done.stderr
    bad.turns[4].obs = bad.turns[4].obs.replace("You move the thermometer", "You drop the thermometer")
    write_episodes(tmp_path / "bad.jsonl", [bad])
    done = run(tmp_path / "bad.jsonl")
    assert done.returncode == 1 and "not complete at its end" in done.stderr, done.stdout + done.stderr
