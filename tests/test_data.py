"""data.py: episodes survive the disk, damaged files are refused, transitions and batches by hand."""

import dataclasses
import json
import re

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
    Credit,
    Decision,
    Episode,
    Segment,
    Transition,
    Turn,
    read_episodes,
    set_returns,
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
    assert flags(items) == [(0, False, False), (1, True, False), (0, True, False)], (
        "turn 2's is the last update"
    )
    assert [t.completion for t in items] == [" p1", " final 0", " p3"]
    assert items[1].prompt == progress_prompt("goal 0", "p1", "a1", obs(2))
    assert [t.next_prompt for t in items] == [items[1].prompt, "", ""]


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
    quarter, free = Credit(invalid_penalty=0.25), Credit(invalid_penalty=0.0)
    rewards = [t.reward for t in of("executor", episode, credit=quarter)]
    assert rewards == [-0.25, 1, 0, -0.25]
    assert [t.reward for t in of("executor", episode)] == [-1, 1, 0, -1], "STEP-HRL's is 1"
    assert [t.reward for t in of("executor", episode, credit=free)] == [0, 1, 0, 0]
    assert [t.reward for t in of("progress", episode, credit=quarter)] == rewards[:3]
    assert [t.reward for t in of("planner", episode, credit=quarter)] == [0, 0]


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
    transitions(WON, "full", Credit(completion="segment", noise=0.5, progress="planner"), flat=True)
    assert json.dumps(dataclasses.asdict(WON)) == before


# --- credit: who says that a subtask is complete ------------------------------------------------------------
# Turn 0 claims, turns 1 and 2 are verified, turn 3 claims; the step limit cuts turn 3.
SAID = [{"claimed_done": True}, {"verified_done": True}, {"verified_done": True}]
SAID = make_episode([*SAID, {"claimed_done": True, "truncated": True}])


@pytest.mark.parametrize(
    ("completion", "executor", "progress"),
    [
        # A claim before its segment's end (a judge ended it) ends nothing; a false claim at the end does.
        (
            "judge",
            [(0, False, False), (1, True, False), (1, True, False), (0, True, False)],
            [(0, False, False), (1, True, False), (1, True, False), (0, True, False)],
        ),
        # Turn 1 ends its segment without a claim: the subtask goes on elsewhere, and its notes end.
        (
            "claim",
            [(1, True, False), (0, False, True), (0, False, False), (1, True, False)],
            [(1, True, False), (0, True, False), (0, False, False), (1, True, False)],
        ),
        # The last turn of a segment and no other, although a step limit cut turn 3.
        (
            "segment",
            [(0, False, False), (1, True, False), (0, False, False), (1, True, False)],
            [(0, False, False), (1, True, False), (0, False, False), (1, True, False)],
        ),
    ],
)
def test_every_reading_of_completion_by_hand(completion, executor, progress):
    credit = Credit(completion=completion)
    assert flags(of("executor", SAID, credit=credit)) == executor
    assert flags(of("progress", SAID, credit=credit)) == progress
    assert flags(of("planner", SAID, credit=credit)) == [(0, False, False), (0, False, True)]
    for t in transitions(SAID, credit=credit):
        assert t.terminated == (t.next_prompt == "") and t.next_level == t.level


def test_a_claim_in_the_middle_of_a_segment_goes_on_to_the_next_action():
    first, second = of("executor", SAID)[:2]
    assert first.completion == " a0; True" and first.next_prompt == second.prompt


def sampled_everywhere(episode):
    """The episode as a policy's: every decision was sampled, and the executor's texts are kept."""
    turns = [dataclasses.replace(t, raw_text=f" A{i}; {t.claimed_done}") for i, t in enumerate(episode.turns)]
    decisions = [Decision("planner", s.start, [7, 2], [-1.0, -1.0]) for s in episode.segments]
    for level in ("executor", "progress"):
        decisions += [Decision(level, i, [5 + i, 2], [-1.0, -0.5]) for i in range(len(turns))]
    return dataclasses.replace(episode, turns=turns, decisions=decisions, source="sft")


def test_segment_writes_a_claim_where_the_segment_ends_and_nowhere_else():
    """STEP-HRL's code. An answer that it changes is no longer what was sampled: no ids, no log-probs."""
    cut_off = make_episode([{}, {}, {}, {"truncated": True}])  # by the cap, then by the step limit
    for episode, changed in [(cut_off, [1, 3]), (SAID, [0, 1]), (WON, [3])]:
        items = of("executor", sampled_everywhere(episode), credit=Credit("segment"))
        claims = [False, True, False, True]
        assert [t.completion.endswith("; True") for t in items] == claims
        assert [t.reward for t in items] == claims
        for i, t in enumerate(items):
            if i in changed:
                assert (t.completion, t.completion_ids) == (f" a{i}; {claims[i]}", [])
                assert t.behavior_logprobs == []
            else:
                assert (t.completion, t.completion_ids) == (f" A{i}; {claims[i]}", [5 + i, 2])
                assert t.behavior_logprobs == [-1.0, -0.5]
        others = [t for t in transitions(sampled_everywhere(episode), credit=Credit("segment"))]
        assert all(t.completion_ids for t in others if t.level != "executor")


@pytest.mark.parametrize("completion", ["judge", "claim"])
def test_the_other_readings_leave_every_answer_as_it_was_sampled(completion):
    items = of("executor", sampled_everywhere(SAID), credit=Credit(completion))
    assert [t.completion for t in items] == [" A0; True", " A1; False", " A2; False", " A3; True"]
    assert [t.completion_ids for t in items] == [[5, 2], [6, 2], [7, 2], [8, 2]]


LONG = make_episode([{"verified_done": i % 3 == 0} for i in range(1000)], segments=((0, 500), (500, 1000)))


def words(episode, **credit):
    return [t.reward for t in of("executor", episode, credit=Credit(**credit))]


@pytest.mark.parametrize("completion", ["judge", "claim", "segment"])
def test_noise_turns_round_its_share_of_the_words_the_same_ones_every_time(completion):
    clean = words(LONG, completion=completion)
    assert words(LONG, completion=completion, noise=1.0) == [1 - x for x in clean]
    some = words(LONG, completion=completion, noise=0.3)
    assert some == words(LONG, completion=completion, noise=0.3)
    flipped = [a != b for a, b in zip(clean, some, strict=True)]
    assert sum(flipped) / 1000 == pytest.approx(0.3, abs=0.05)  # standard error 0.0145


def test_noise_depends_on_episode_and_turn_and_more_noise_keeps_what_less_turned_round():
    def flipped(episode, noise):
        pairs = zip(words(episode), words(episode, noise=noise), strict=True)
        return {i for i, (a, b) in enumerate(pairs) if a != b}

    assert flipped(LONG, 0.0) == set()
    assert flipped(LONG, 0.1) < flipped(LONG, 0.3) < flipped(LONG, 1.0) == set(range(1000))
    other = dataclasses.replace(LONG, source="sft-1")
    assert flipped(other, 0.3) != flipped(LONG, 0.3)


def test_a_word_turned_round_pays_and_ends_like_a_true_one():
    items = of("executor", WON, credit=Credit(noise=1.0))  # only turn 1 was verified; it also claims
    assert flags(items) == [(1, True, False), (0, True, False), (1, True, False), (1, True, False)]


@pytest.mark.parametrize("noise", [-0.1, 1.1, float("nan")])
def test_noise_outside_of_0_to_1_is_refused_with_an_example(noise):
    with pytest.raises(ValueError, match=rf"noise is {noise}, expected a probability, e\.g\. 0\.1"):
        Credit(noise=noise)


# --- credit: what a step limit is ---------------------------------------------------------------------------
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("progress", ["action", "planner"])
def test_a_limit_that_ends_is_as_if_the_world_had_ended(progress, flat):
    turns, segments = [{"reward": 0.1}, VERIFIED, {"reward": 0.2}], ((0, 4),) if flat else ((0, 2), (2, 4))
    cut, ended = (make_episode([*turns, {word: True}], segments) for word in ("truncated", "terminated"))
    as_usual, fatal = Credit(progress=progress), Credit(progress=progress, limit="end")
    assert transitions(cut, credit=fatal, flat=flat) == transitions(ended, credit=as_usual, flat=flat)
    assert transitions(cut, credit=fatal, flat=flat) != transitions(cut, credit=as_usual, flat=flat)
    assert cut.turns[-1].truncated and not cut.turns[-1].terminated, "the episode stays as it is"


# --- credit: what a fatal mistake costs ---------------------------------------------------------------------
@pytest.mark.parametrize("flat", [False, True])
def test_a_clipped_failure_costs_the_points_so_far(flat):
    turns = [{"reward": 0.03}, {"reward": 0.67}, {"reward": -1.72, "terminated": True}]
    episode = make_episode(turns, ((0, 3),) if flat else ((0, 2), (2, 3)))
    episode.score = -100.0  # the start had 2 points
    level = "executor" if flat else "planner"
    earned = {
        clip: [t.reward for t in of(level, episode, credit=Credit(clip_failure=clip), flat=flat)]
        for clip in (False, True)
    }
    assert earned[False] == pytest.approx([0.03, 0.67, -1.72] if flat else [0.7, -1.72])
    assert earned[True] == pytest.approx([0.03, 0.67, -0.72] if flat else [0.7, -0.72])
    assert episode.turns[-1].reward == -1.72, "the episode stays as it is"


# --- credit: what earns the progress policy -----------------------------------------------------------------
BY_PLANNER = Credit(progress="planner")


def test_progress_paid_by_the_planner_earns_nothing_and_hands_over_to_the_planners_value():
    episode = make_episode([{"reward": 0.1}, VERIFIED, {"reward": 0.2}, {"truncated": True}])
    items, actions = of("progress", episode, credit=BY_PLANNER), of("executor", episode, credit=BY_PLANNER)
    assert flags(items) == [(0, False, False)] * 4
    assert [t.next_level for t in items] == ["progress", "planner", "progress", "planner"]
    first, second = of("planner", episode)
    handed = [items[1].prompt, second.prompt, items[3].prompt, planner_prompt(episode, 4, obs(4))]
    assert [t.next_prompt for t in items] == handed and handed[1] == first.next_prompt
    assert flags(actions) == flags(of("executor", episode)), "the executor's pay is as before"


def test_the_last_progress_of_a_won_episode_is_handed_to_nobody():
    items = of("progress", WON, credit=BY_PLANNER)
    assert flags(items) == [(0, False, False), (0, False, False), (0, True, False)]
    assert [t.next_level for t in items] == ["progress", "planner", "progress"] and items[2].next_prompt == ""


def test_progress_paid_by_the_planner_is_not_ended_or_fined_on_the_way():
    episode = make_episode([{"verified_done": True}, {}, {"claimed_done": True}, {}], segments=((0, 4),))
    episode.turns[2].obs = "Unknown action\n\nroom 2\n\nbag 2"
    items = of("progress", episode, credit=BY_PLANNER)
    assert flags(items) == [(0, False, False)] * 4
    assert [t.next_prompt for t in items[:3]] == [t.prompt for t in items[1:]]
    assert flags(of("progress", episode))[:2] == [(1, True, False), (-1, False, False)], "else it is"


# --- the flat agent -----------------------------------------------------------------------------------------
PAID = [{"reward": 0.1}, {"reward": 0.2} | VERIFIED, {"claimed_done": True}]
FLAT_WON = make_episode([*PAID, {"reward": 0.7, "terminated": True}], segments=((0, 4),))
FLAT_CUT = make_episode([*PAID, {"claimed_done": True, "truncated": True}], segments=((0, 4),))


def test_a_flat_executor_earns_the_rewards_of_the_world_and_ends_with_it():
    items = of("executor", FLAT_WON, flat=True)
    assert flags(items) == [(0.1, False, False), (0.2, False, False), (0, False, False), (0.7, True, False)]
    assert [t.next_prompt for t in items] == [t.prompt for t in items[1:]] + [""]
    assert of("planner", FLAT_WON, flat=True) == [] and {t.steps for t in items} == {1}


def test_a_flat_executor_is_truncated_at_the_step_limit_with_the_prompt_that_would_follow():
    *others, last = of("executor", FLAT_CUT, flat=True)
    assert flags([last]) == [(0, False, True)] and not any(t.terminated or t.truncated for t in others)
    assert last.next_prompt == executor_prompt(FLAT_CUT, 0, 4, "goal 0", "final 0", obs(4))
    assert "said 4" in last.next_prompt and "final 0" in last.next_prompt


def test_a_flat_agents_progress_is_credited_like_its_action_whatever_the_planner_would_pay():
    expected = [(0.1, False, False), (0.2, False, False), (0, True, False)]  # none after the world ended
    for credit in (Credit(), BY_PLANNER):
        items = of("progress", FLAT_WON, flat=True, credit=credit)
        assert flags(items) == expected and {t.next_level for t in items} == {"progress"}
        *others, last = of("progress", FLAT_CUT, flat=True, credit=credit)
        assert flags(others) == [*expected[:2], (0, False, False)] and flags([last]) == [(0, True, False)]
        assert (last.completion, last.next_prompt) == (" final 0", "")


@pytest.mark.parametrize(
    "credit", [Credit("judge"), Credit("claim"), Credit("segment"), Credit(noise=1.0)], ids=str
)
def test_completion_means_nothing_to_a_flat_agent(credit):
    for episode in (FLAT_WON, FLAT_CUT):
        assert transitions(episode, credit=credit, flat=True) == transitions(episode, flat=True)


def test_a_flat_agent_pays_for_what_is_not_understood():
    episode = dataclasses.replace(FLAT_WON, final_obs="Nothing happens\n\nroom 4\n\nbag 4")
    rewards = [t.reward for t in of("executor", episode, flat=True, credit=Credit(invalid_penalty=0.5))]
    assert rewards == [0.1, 0.2, 0, pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("episode", "flat"), [(WON, False), (SAID, False), (FLAT_WON, True), (FLAT_CUT, True)]
)
@pytest.mark.parametrize("history", ["progress", "full", "window"])
def test_every_action_is_a_decision_the_last_one_of_the_episode_too(episode, flat, history):
    items = of("executor", episode, flat=flat, history=history)
    assert [t.turn for t in items] == [0, 1, 2, 3] and items[-1].completion.startswith(" a3; ")


# --- what follows, and Monte-Carlo returns ------------------------------------------------------------------
def links(items):
    """{(level, turn): (level, turn) of the decision that follows, or None}."""
    return {
        (t.level, t.turn): (t.follows.level, t.follows.turn) if t.follows else None for t in items
    }  # fmt: skip


def test_follows_leads_to_the_next_decision_of_the_level_and_not_across_an_end():
    assert links(transitions(WON)) == {
        ("planner", 0): ("planner", 2), ("planner", 2): None,
        ("executor", 0): ("executor", 1), ("executor", 1): None,  # complete
        ("executor", 2): ("executor", 3), ("executor", 3): None,  # the world ended
        ("progress", 0): ("progress", 1), ("progress", 1): None,
        ("progress", 2): None,  # nobody wrote progress after the world ended
    }  # fmt: skip


def test_follows_is_none_where_a_cap_or_a_limit_cut_the_executor_off():
    cut = links(transitions(make_episode([{}, {}, {}, {"truncated": True}])))
    assert cut["executor", 1] is cut["executor", 3] is cut["planner", 2] is None
    assert cut["planner", 0] == ("planner", 2) and cut["executor", 2] == ("executor", 3)


def test_follows_of_a_progress_that_is_handed_over_is_the_planner():
    cut = make_episode([{}, {}, {}, {"truncated": True}])
    found = {k: v for k, v in links(transitions(cut, credit=BY_PLANNER)).items() if k[0] == "progress"}
    assert found == {
        ("progress", 0): ("progress", 1), ("progress", 1): ("planner", 2),
        ("progress", 2): ("progress", 3), ("progress", 3): None,
    }  # fmt: skip


def test_follows_of_a_flat_agent_is_one_chain():
    assert links(t for t in transitions(FLAT_CUT, "full", flat=True)) == {
        ("executor", i): ("executor", i + 1) if i < 3 else None for i in range(4)
    }


def returns(episode, discount="subtask", gamma=0.5, **options):
    items = transitions(episode, **options)
    set_returns(items, gamma, discount)
    return {
        level: [pytest.approx(t.mc_return, nan_ok=True) for t in items if t.level == level]
        for level in LEVELS
    }


NAN = float("nan")


def test_returns_by_hand():
    assert returns(WON) == {"planner": [0.3 + 0.5 * 0.7, 0.7], "executor": [0.5, 1, 0, 0],
                            "progress": [0.5, 1, 0]}  # fmt: skip
    assert returns(WON, "smdp")["planner"] == [0.3 + 0.25 * 0.7, 0.7]
    assert returns(WON, "smdp")["executor"] == [0.5, 1, 0, 0]
    by_planner = returns(WON, credit=BY_PLANNER)
    assert by_planner["progress"] == [0.5 * 0.5 * 0.7, 0.5 * 0.7, 0]
    assert by_planner["planner"] == returns(WON)["planner"]
    assert returns(FLAT_WON, flat=True) == {
        "planner": [], "executor": [0.1 + 0.5 * (0.2 + 0.5 * 0.5 * 0.7), 0.2 + 0.25 * 0.7, 0.35, 0.7],
        "progress": [0.1 + 0.5 * 0.2, 0.2, 0],
    }  # fmt: skip


def test_returns_are_not_known_where_the_data_were_cut_off():
    cut = make_episode([{}, VERIFIED, {}, {"reward": 0.25, "truncated": True}])
    assert returns(cut) == {"planner": [NAN, NAN], "executor": [0.5, 1, NAN, NAN],
                            "progress": [0.5, 1, 0, 0]}  # fmt: skip
    assert returns(FLAT_CUT, flat=True)["executor"] == [NAN] * 4


def test_returns_of_many_episodes_are_those_of_each():
    def items():
        return [
            t
            for episode in (WON, SAID, dataclasses.replace(SAID, source="sft"))
            for t in transitions(episode)
        ]

    together, alone = items(), items()
    set_returns(together, 0.9, "smdp")
    for part in (alone[:9], alone[9:19], alone[19:]):
        assert len({t.episode_id for t in part}) == 1
        set_returns(part, 0.9, "smdp")
    assert [repr(t.mc_return) for t in together] == [repr(t.mc_return) for t in alone]
    assert len({repr(t.mc_return) for t in together}) > 4


# --- history modes ------------------------------------------------------------------------------------------
def memory(prompt):
    return re.search("^(Progress|History): .*(?=\nSubtask:)", prompt, re.DOTALL | re.MULTILINE)[0]


def test_history_modes_of_the_planner_by_hand():
    episode = make_episode([{}] * 12, segments=tuple((2 * k, 2 * k + 2) for k in range(6)))
    assert memory(planner_prompt(episode, 0, obs(0))) == "Progress: None\nFinished: none"
    assert memory(planner_prompt(episode, 0, obs(0), "full")) == "History: none"
    assert memory(planner_prompt(episode, 4, obs(4))) == "Progress: final 1\nFinished: goal 0; goal 1"
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
    defaults = {"behavior_logprobs": [], "reward": 0.0, "steps": 1, "terminated": next_prompt == ""}
    defaults |= {"truncated": False, "next_level": level, "source": "s", "episode_id": "e", "turn": 0}
    return Transition(level, prompt, completion, list(ids), next_prompt=next_prompt, **defaults | fields)


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
    assert batch.next_index.tolist() == [2, 0]
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


NO_ANSWER = -1


def test_collate_appends_the_answer_that_follows_by_hand():
    sampled, expert = item("two", ids=[9, 9]), item("three", "four")  # cut, so without EOS; and with it
    items = [
        item("one", "two", next_prompt="two", follows=sampled),
        item("one", "two", next_prompt="one two three", follows=expert),
        item("one", "two", next_prompt="five six"),  # cut off: nothing follows
        item("one", "two"),  # terminated
    ]
    plain, batch = collate(items, make_tokenizer()), collate(items, make_tokenizer(), next_answers=True)
    assert batch.next_ids.tolist() == [
        [1, 5, 9, 9, 0, 0], [1, 4, 5, 6, 7, 2], [1, 8, 9, 0, 0, 0], [1, 0, 0, 0, 0, 0]
    ]  # fmt: skip
    assert batch.next_index.tolist() == plain.next_index.tolist() == [1, 3, 2, 0]
    assert batch.next_action_index.tolist() == [3, 5, NO_ANSWER, NO_ANSWER]
    assert plain.next_action_index.tolist() == [NO_ANSWER] * 4
    assert plain.next_ids.tolist() == [[1, 5, 0, 0], [1, 4, 5, 6], [1, 8, 9, 0], [1, 0, 0, 0]]
    for field in dataclasses.fields(Batch):
        if not field.name.startswith("next_"):
            assert same(getattr(batch, field.name), getattr(plain, field.name)), field.name


def same(a, b):
    return torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)


def test_collate_puts_what_the_policy_answers_behind_the_same_prompt_by_hand():
    items = [item("one two", "three", next_prompt="four"), item("one", "two two two")]
    answers = {id(items[0]): [9, 9, 2], id(items[1]): [8]}  # the second one was cut
    for tokenizer in (make_tokenizer(), make_tokenizer(pad_token="<eos>")):
        plain, batch = collate(items, tokenizer), collate(items, tokenizer, policy_answers=answers)
        pad = tokenizer.pad_token_id
        assert batch.input_ids.tolist() == [[1, 4, 5, 6, 2, 9, 9, 2], [1, 4, 5, 5, 5, 2, 8, pad]]
        assert batch.segment.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 2, -1]]
        assert batch.policy_index.tolist() == [7, 6] and plain.policy_index.tolist() == [-1, -1]
        assert torch.equal(batch.action_mask[:, :6], plain.action_mask)
        assert torch.equal(batch.next_ids, plain.next_ids)


def test_columns_of_who_decided_and_what_came_of_it():
    items = [
        item("one", "two", source="expert", mc_return=0.25, next_prompt="two"),
        item("one", ids=[9, 2], behavior_logprobs=[-1.5, -0.25], level="progress", next_prompt="two",
             next_level="planner"),
    ]  # fmt: skip
    batch = collate(items, make_tokenizer())
    assert batch.expert.tolist() == [True, False] and batch.expert.dtype == torch.bool
    assert batch.behavior_logp.isnan().tolist() == [True, False] and batch.behavior_logp[1] == -1.75
    assert batch.mc_return.isnan().tolist() == [False, True] and batch.mc_return[0] == 0.25
    assert batch.behavior_logp.dtype == batch.mc_return.dtype == torch.float32
    assert batch.level.tolist() == [LEVELS.index("executor"), LEVELS.index("progress")]
    assert batch.next_level.tolist() == [LEVELS.index("executor"), LEVELS.index("planner")]


@pytest.mark.parametrize("asked", [False, True], ids=["without policy answers", "with policy answers"])
def test_split_gives_the_same_rows_in_order(asked):
    items = [item("one two"[: 3 + 4 * (i % 2)], "three", reward=float(i)) for i in range(5)]
    answers = {id(t): [9] * (1 + i) for i, t in enumerate(items)} if asked else None
    batch = collate(items, make_tokenizer(), policy_answers=answers)
    parts = batch.split(2)
    assert [len(part.reward) for part in parts] == [2, 2, 1]
    assert batch.input_ids.shape[1] == (9 if asked else 5)
    for field in dataclasses.fields(Batch):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert same(joined, getattr(batch, field.name)), field.name


def test_to_moves_every_column_and_changes_none():
    batch = collate([item("one", "two"), item("one two", "three")], make_tokenizer())
    moved = batch.to("meta")
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        assert same(getattr(batch.to("cpu"), field.name), before), field.name


TEXT = st.lists(st.sampled_from(list(WORDS)[4:]), max_size=6).map(" ".join)
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=5)  # padding, BOS and EOS among them
ITEM = st.builds(
    lambda prompt, completion, ids, next_prompt, follows, level: item(
        prompt, completion, ids, next_prompt, level, follows=item("", *follows) if next_prompt else None
    ),
    TEXT, TEXT, st.just([]) | IDS, TEXT, st.tuples(TEXT, st.just([]) | IDS), st.sampled_from(LEVELS),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(ITEM, min_size=1, max_size=6),
    bos=st.sampled_from(["<bos>", None]),
    pad=st.sampled_from(["<pad>", "<eos>", None]),
    data=st.data(),
)
def test_any_ragged_items_read_back_without_padding_as_they_were_encoded(items, bos, pad, data):
    if bos is None:  # a tokenizer without BOS needs a prompt to read V from
        items = [t if t.prompt else dataclasses.replace(t, prompt="one") for t in items]
    tokenizer = make_tokenizer(bos_token=bos, pad_token=pad)
    answers = {id(t): data.draw(IDS) for t in items}
    batch = collate(items, tokenizer, next_answers=True, policy_answers=answers)
    for row, t in enumerate(items):
        prompt, completion = encode(tokenizer, t.prompt, t.completion, t.completion_ids)
        ids, mask = batch.input_ids[row], batch.attention_mask[row]
        answer = answers[id(t)]
        assert ids[mask].tolist() == prompt + completion + answer
        assert mask.tolist() == sorted(mask.tolist())[::-1]
        assert ids[batch.action_mask[row]].tolist() == completion
        assert batch.action_mask[row].nonzero()[0].item() == len(prompt)
        assert batch.state_index[row] == len(prompt) - 1
        assert batch.action_index[row] == len(prompt) + len(completion) - 1

        state = encode(tokenizer, t.next_prompt, "")[0] or [tokenizer.eos_token_id]
        after = t.follows and encode(tokenizer, "", t.follows.completion, t.follows.completion_ids)[1]
        follows = state + (after or [])
        assert batch.next_ids[row][: len(follows)].tolist() == follows
        assert batch.next_index[row] == len(state) - 1
        assert batch.next_action_index[row] == (len(state + after) - 1 if after else NO_ANSWER)

        assert ids[batch.segment[row] == 0].tolist() == prompt
        assert ids[batch.segment[row] == 2].tolist() == answer
        assert batch.policy_index[row] == len(prompt + completion + answer) - 1


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
