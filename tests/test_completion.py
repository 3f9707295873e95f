"""completion.py: a noisy judge, verdicts written anew, what ended a subtask, the summary by hand."""

import copy
import math

import pytest
from test_annotate import small_episode
from test_data import make_episode

from annotate import annotate
from completion import agreement, ended_by, noisy, rejudge, summary
from labels import check
from scienceworld_rules import judge

QUESTIONS = [(f"get the pot {i % 50}", f"You see {i}.") for i in range(2000)]


def every_third(subtask, obs):
    return int(obs[8:-1]) % 3 == 0


# --- noise --------------------------------------------------------------------------------------------------
def test_without_noise_the_judge_is_itself_and_with_all_noise_its_opposite():
    assert noisy(every_third, 0.0) is every_third
    liar = noisy(every_third, 1.0)
    assert [liar(*q) for q in QUESTIONS] == [not every_third(*q) for q in QUESTIONS]


def turned(probability, seed=0):
    """The questions that get the other answer."""
    unsure = noisy(every_third, probability, seed)
    return {q for q in QUESTIONS if unsure(*q) != every_third(*q)}


def test_noise_turns_round_its_share_of_true_and_of_false_verdicts():
    wrong = turned(0.3)
    for said in (True, False):
        of_them = [q for q in QUESTIONS if every_third(*q) == said]
        share = sum(q in wrong for q in of_them) / len(of_them)
        assert share == pytest.approx(0.3, abs=0.06)  # standard error 0.018 at most


def test_the_same_question_gets_the_same_answer_and_another_seed_other_answers():
    unsure = noisy(every_third, 0.3)
    assert [unsure(*q) for q in QUESTIONS] == [unsure(*q) for q in QUESTIONS]
    assert turned(0.3) == turned(0.3) != turned(0.3, seed=1)
    assert turned(0.1) < turned(0.3), "more noise keeps what less noise turned round"


def test_noise_depends_on_the_subtask_and_on_the_observation():
    unsure = noisy(lambda subtask, obs: False, 0.5)
    assert len({unsure(f"goal {i}", "seen") for i in range(30)}) == 2
    assert len({unsure("goal", f"seen {i}") for i in range(30)}) == 2


@pytest.mark.parametrize("probability", [-0.01, 1.01, math.nan])
def test_noise_that_is_no_probability_is_refused_with_an_example(probability):
    with pytest.raises(
        ValueError, match=r"the noise of the judge is .*, expected a probability, e\.g\. 0\.1"
    ):
        noisy(every_third, probability)


# --- verdicts written anew ----------------------------------------------------------------------------------
def test_rejudge_asks_about_every_action_and_leaves_the_episode_as_it_was():
    episode, asked = annotate(small_episode()), []
    before = copy.deepcopy(episode)

    def said(subtask, obs):
        asked.append((subtask, obs))
        return len(asked) % 2

    new = rejudge(episode, said)
    assert asked == [(t.subtask, episode.obs_after(i)) for i, t in enumerate(episode.turns)]
    assert [t.verified_done for t in new.turns] == [True, False] * 3, "as bool"
    assert episode == before and new is not episode and new.turns[0] is not episode.turns[0]
    for turn, old in zip(new.turns, episode.turns, strict=True):
        turn.verified_done = old.verified_done
    assert new == before, "nothing else changed"


def test_rejudging_by_the_same_rules_changes_nothing_and_a_lie_is_no_honest_label():
    episode = annotate(small_episode())
    assert rejudge(episode, judge) == episode
    assert any("does not carry" in p for p in check(rejudge(episode, noisy(judge, 1.0))))


def test_agreement_is_the_share_of_actions_with_the_same_verdict():
    episode = annotate(small_episode())  # verified after 4 of 6 actions
    assert agreement([episode], judge) == 1 and agreement([episode], noisy(judge, 1.0)) == 0
    assert agreement([episode, rejudge(episode, lambda *_: True)], judge) == pytest.approx(10 / 12)
    assert agreement([episode], lambda *_: 0) == pytest.approx(2 / 6)
    assert math.isnan(agreement([], judge)) and math.isnan(agreement([make_episode([], segments=())], judge))


# --- what ended a subtask -----------------------------------------------------------------------------------
CLAIMED, VERIFIED = {"claimed_done": True}, {"verified_done": True}


@pytest.mark.parametrize(
    ("last", "claim", "judge", "cap", "episode"),
    [
        ({}, "cap", "cap", "cap", "cap"),
        (CLAIMED, "claim", "cap", "cap", "cap"),
        (VERIFIED, "cap", "judge", "cap", "cap"),
        (CLAIMED | VERIFIED, "claim", "judge", "cap", "cap"),
        (CLAIMED | VERIFIED | {"truncated": True}, "limit", "limit", "limit", "limit"),
        (CLAIMED | VERIFIED | {"terminated": True}, "world", "world", "world", "world"),
    ],
)
def test_what_ended_a_subtask_by_hand(last, claim, judge, cap, episode):
    played = make_episode([CLAIMED | VERIFIED, last], segments=((0, 2),))  # turn 0 is not its end
    for ends, how in {"claim": claim, "judge": judge, "cap": cap, "episode": episode}.items():
        assert ended_by(played, played.segments[0], ends) == how


def test_only_the_end_of_its_own_segment_ends_a_subtask():
    episode = make_episode([{}, CLAIMED, {}, {"terminated": True}])
    assert [ended_by(episode, s, "claim") for s in episode.segments] == ["claim", "world"]


# --- the summary --------------------------------------------------------------------------------------------
def test_summary_by_hand():
    first = make_episode([{}, CLAIMED | VERIFIED, CLAIMED, {"terminated": True} | VERIFIED])
    second = make_episode([VERIFIED, CLAIMED, {}, {"truncated": True}], segments=((0, 2), (2, 3), (3, 4)))
    # claim, verdict: of 8 actions both once, claim alone twice, verdict alone twice, neither three times
    expected = {
        "ends": "claim", "count": 5, "mean_length": 1.6,
        "ended_by": {"claim": 2, "judge": 0, "cap": 1, "limit": 1, "world": 1},
        "agreement": 0.5, "precision": 0.3333, "recall": 0.3333,
    }  # fmt: skip
    assert summary([first, second]) == summary([second, first]) == expected
    by_judge = {"claim": 0, "judge": 1, "cap": 2, "limit": 1, "world": 1}
    assert summary([first, second], "judge") == expected | {"ends": "judge", "ended_by": by_judge}


@pytest.mark.parametrize(
    ("turns", "agreement", "precision", "recall"),
    [
        ([{}, {}], 1.0, None, None),
        ([CLAIMED, {}], 0.5, 0.0, None),
        ([VERIFIED, {}], 0.5, None, 0.0),
        ([CLAIMED | VERIFIED, CLAIMED | VERIFIED], 1.0, 1.0, 1.0),
    ],
)
def test_a_share_of_nothing_is_none(turns, agreement, precision, recall):
    found = summary([make_episode(turns, segments=((0, 2),))])
    assert (found["agreement"], found["precision"], found["recall"]) == (agreement, precision, recall)


@pytest.mark.parametrize("episodes", [[], [small_episode()]], ids=["none", "no subtasks"])
def test_a_summary_of_no_subtasks_is_empty(episodes):
    assert summary(episodes, "judge") == {
        "ends": "judge", "count": 0, "mean_length": 0.0,
        "ended_by": {"claim": 0, "judge": 0, "cap": 0, "limit": 0, "world": 0},
        "agreement": None, "precision": None, "recall": None,
    }  # fmt: skip
