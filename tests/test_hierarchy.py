"""hierarchy.py with a scripted policy and a made-up world: who is asked when; training sees the same."""

import dataclasses
import random
from collections import Counter
from typing import get_args

import pytest

from completion import ended_by
from data import Credit, Episode, Segment, Turn, read_episodes, transitions, write_episodes
from envs import StepResult
from hierarchy import MAX_NEW_TOKENS, Answer, Counts, Curious, Ends, Guided, Player, episode_seed, rollout
from prompts import compact


class FakePool:
    """Episodes of `length` steps (odd variations: one more), ended by `end`; then it cannot go on."""

    def __init__(self, size, length=4, end="terminated"):
        self.size, self.length, self.end = size, length, end
        self.running, self.resets, self.calls = {}, [], []

    def call(self, requests):
        self.calls.append(requests)
        assert all(0 <= slot < self.size for slot in requests)
        return {slot: getattr(self, name)(slot, *args) for slot, (name, *args) in requests.items()}

    def reset(self, slot, task, variation):
        assert slot not in self.running, "the slot is still in use"
        self.resets.append((task, variation))
        self.running[slot] = (task, variation, 0)
        return self.result(slot, "look around")

    def step(self, slot, action):
        task, variation, t = self.running[slot]  # KeyError: the episode is over
        self.running[slot] = (task, variation, t + 1)
        return self.result(slot, action)

    def result(self, slot, action):
        task, variation, t = self.running[slot]
        over = t == self.length + variation % 2
        terminated = over and self.end == "terminated"
        if over:
            del self.running[slot]
        obs = f"{task} {variation}: {action} was number {t}\n\nroom {t}\n\nbag {t}"
        return StepResult(
            obs,
            f"Do {task} {variation}.",
            0.1 * (t > 0),
            10 * t,
            terminated,
            over and not terminated,
            terminated,
        )


class Scripted:
    """answers[role] is a list of texts used in turn (the last repeats) or a function of the request."""

    def __init__(self, **answers):
        self.answers = {
            "planner": [" goal 0", " goal 1", " goal 2"],
            "executor": [" go; False"],
            "progress": [" p1", " p2", " p3"],
        }
        self.answers |= answers
        self.requests, self.batches = [], []

    def answer(self, requests):
        assert requests
        self.batches.append(len(requests))
        return [self.one(request) for request in requests]

    def one(self, request):
        n = sum(r.role == request.role for r in self.requests)
        self.requests.append(request)
        script = self.answers[request.role]
        text = script(request) if callable(script) else script[min(n, len(script) - 1)]
        return Answer(text, [len(self.requests), 2], [-0.123456, -1.0], prompt_tokens=len(request.prompt))

    def prompts(self, role):
        return [r.prompt for r in self.requests if r.role == role]


def dice(role):
    """Answers that depend on the request's seed alone."""

    def answer(request):
        rng = random.Random(request.seed)
        return f" {role} {rng.randrange(9)}" + ("; True" if rng.random() < 0.3 else "; False") * (
            role == "executor"
        )

    return answer


def random_policy():
    return Scripted(**{role: dice(role) for role in MAX_NEW_TOKENS})


def coin(subtask, obs):
    """A judge that confirms about a third, always the same."""
    return random.Random(subtask + obs).random() < 0.3


ENDS = get_args(Ends)
PANEL = [(task, variation) for task in ("boil", "melt") for variation in range(5)]


def play(policy=None, pool=None, panel=(("boil", 0),), judge=lambda subtask, obs: False, **options):
    policy = policy or Scripted()
    return list(rollout(pool or FakePool(1), list(panel), policy, judge, **options))


def spans(episode):
    return [(s.subtask, s.start, s.end, s.final_progress) for s in episode.segments]


# --- how a subtask ends -------------------------------------------------------------------------------------
def test_a_subtask_ends_when_the_executor_claims_it_is_done():
    policy = Scripted(executor=[" a; False", " b; True", " c; False"])
    (episode,) = play(policy)
    assert spans(episode) == [("goal 0", 0, 2, "p2"), ("goal 1", 2, 4, "p3")]
    assert [t.action for t in episode.turns] == ["a", "b", "c", "c"]
    assert [t.claimed_done for t in episode.turns] == [False, True, False, False]
    assert [t.subtask for t in episode.turns] == ["goal 0", "goal 0", "goal 1", "goal 1"]


@pytest.mark.parametrize(
    ("length", "capped", "edges"), [(8, 2, [(0, 3), (3, 6), (6, 8)]), (6, 1, [(0, 3), (3, 6)])]
)
@pytest.mark.parametrize("ends", ["claim", "judge", "cap"])
def test_a_subtask_ends_at_the_cap_and_the_end_of_the_episode_is_not_counted_as_the_cap(
    length, capped, edges, ends
):
    (episode,) = play(pool=FakePool(1, length), max_actions=3, ends=ends)
    assert [(s.start, s.end) for s in episode.segments] == edges
    how = [ended_by(episode, segment, ends) for segment in episode.segments]
    assert how == ["cap"] * capped + ["world"]
    assert not any(t.claimed_done or t.verified_done for t in episode.turns)


def claim_second_and_confirm_third(**options):
    """The executor claims after action 1, the judge confirms after action 2 of five."""
    asked = []

    def judge(subtask, obs):
        asked.append(subtask)
        return len(asked) == 3

    policy = Scripted(executor=[" a; False", " b; True", " c; False"])
    (episode,) = play(policy, FakePool(1, 5), judge=judge, max_actions=4, **options)
    assert [t.claimed_done for t in episode.turns] == [False, True, False, False, False]
    assert [t.verified_done for t in episode.turns] == [False, False, True, False, False]
    return episode, policy


@pytest.mark.parametrize(
    ("ends", "edges", "how"),
    [
        ("claim", [(0, 2), (2, 5)], ["claim", "world"]),
        ("judge", [(0, 3), (3, 5)], ["judge", "world"]),
        ("cap", [(0, 4), (4, 5)], ["cap", "world"]),
        ("episode", [(0, 5)], ["world"]),
    ],
)
def test_what_ends_a_subtask_by_hand(ends, edges, how):
    episode, policy = claim_second_and_confirm_third(ends=ends)
    assert [(s.start, s.end) for s in episode.segments] == edges
    assert [ended_by(episode, segment, ends) for segment in episode.segments] == how
    planned = len(policy.prompts("planner"))
    assert planned == (0 if ends == "episode" else len(edges))
    first = [start for start, _ in edges]
    assert [i for i, t in enumerate(episode.turns) if t.progress == "None"] == first, (
        "a new subtask, new notes"
    )


def test_the_subtask_of_a_flat_agent_is_the_task_and_neither_planner_nor_cap_comes_in_between():
    policy, pool = Scripted(), FakePool(1, 40)
    (episode,) = play(policy, pool, ends="episode", max_actions=3, judge=lambda subtask, obs: True)
    task = compact(episode.description)
    assert task == "Do boil 0" and episode.description == "Do boil 0."
    assert spans(episode) == [(task, 0, 40, "p3")] and {t.subtask for t in episode.turns} == {task}
    assert policy.prompts("planner") == [] and {d.level for d in episode.decisions} == {
        "executor",
        "progress",
    }
    assert all(f"Subtask: {task}\n" in prompt for prompt in policy.prompts("executor"))
    assert [t.progress for t in episode.turns[:4]] == ["None", "p1", "p2", "p3"]


def test_a_flat_agent_at_the_step_limit_writes_its_progress_once_more():
    (episode,) = play(Scripted(), FakePool(1, 3, "truncated"), ends="episode")
    assert [d.level for d in episode.decisions] == ["executor", "progress"] * 3
    assert episode.segments[0].final_progress == "p3"


def test_after_the_world_ended_no_role_is_asked():
    policy = Scripted()
    (episode,) = play(policy, FakePool(1, 4, "terminated"))
    assert [len(policy.prompts(role)) for role in ("planner", "executor", "progress")] == [1, 4, 3]
    assert spans(episode) == [("goal 0", 0, 4, "p3")]
    assert [t.terminated for t in episode.turns] == [False] * 3 + [True] and not any(
        t.truncated for t in episode.turns
    )
    assert (episode.success, episode.score, episode.final_obs.split(":")[1][:7]) == (True, 40, " go was")


def test_at_the_step_limit_the_progress_is_written_once_more_for_the_bootstrap():
    policy = Scripted(progress=[" p1", " p2", " p3", " p4"])
    (episode,) = play(policy, FakePool(1, 4, "truncated"))
    assert [len(policy.prompts(role)) for role in ("planner", "executor", "progress")] == [1, 4, 4]
    assert spans(episode) == [("goal 0", 0, 4, "p4")]
    assert [t.truncated for t in episode.turns] == [False] * 3 + [True] and not any(
        t.terminated for t in episode.turns
    )
    assert not episode.success


@pytest.mark.parametrize("ends", ["claim", "cap", "episode"])
def test_the_judge_sees_subtask_and_outcome_fills_verified_and_ends_nothing_unless_asked_to(ends):
    seen = []

    def judge(subtask, obs):
        seen.append((subtask, obs))
        return len(seen) == 2

    (episode,) = play(judge=judge, ends=ends)
    assert [t.verified_done for t in episode.turns] == [False, True, False, False]
    assert [(s.start, s.end) for s in episode.segments] == [(0, 4)]
    assert seen == [(episode.segments[0].subtask, episode.obs_after(t)) for t in range(4)]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("history", ["progress", "full"])
@pytest.mark.parametrize("ends", ENDS)
def test_segments_cover_the_turns_whatever_the_policy_does(end, history, ends, tmp_path):
    options = {"max_actions": 3, "history": history, "ends": ends, "judge": coin}
    episodes = play(random_policy(), FakePool(3, 7, end), PANEL, **options)
    for episode in episodes:
        edges = [0] + [s.end for s in episode.segments]
        assert edges == [s.start for s in episode.segments] + [len(episode.turns)] and edges == sorted(
            set(edges)
        )
        assert all(
            turn.subtask == s.subtask for s in episode.segments for turn in episode.turns[s.start : s.end]
        )
    assert len({len(e.segments) for e in episodes}) > 1 or ends in ("cap", "episode")
    write_episodes(tmp_path / "a.jsonl", episodes)
    assert read_episodes(tmp_path / "a.jsonl") == episodes


# --- progress -----------------------------------------------------------------------------------------------
def test_progress_starts_as_none_in_every_subtask_and_its_last_text_reaches_the_planner():
    policy = Scripted(executor=[" a; False", " b; True", " c; False"])
    (episode,) = play(policy)
    assert [t.progress for t in episode.turns] == ["None", "p1", "None", "p3"]
    assert ["Progress: None\n" in p for p in policy.prompts("executor")] == [True, False, True, False]
    assert ["Progress: None\n" in p for p in policy.prompts("progress")] == [True, False, True]
    first, second = policy.prompts("planner")
    assert "Progress: None\nFinished: none\n" in first and "Progress: p2\nFinished: goal 0\n" in second


def test_empty_answers_become_none_and_the_episode_goes_on():
    (episode,) = play(Scripted(planner=[" "], executor=[""], progress=[" \n"]))
    assert spans(episode) == [("none", 0, 4, "None")]
    assert [(t.action, t.raw_text) for t in episode.turns] == [("none", "")] * 4


def test_an_answer_that_cannot_be_parsed_is_played_as_it_is_and_counted():
    counts = Counts()
    policy = Scripted(executor=[" look around", " go; True", " go; maybe", " stop; False"])
    (episode,) = play(policy, FakePool(1, 5), counts=counts)
    assert counts.parse_failures == 2
    assert [t.action for t in episode.turns] == ["look around", "go", "go; maybe", "stop", "stop"]
    assert [t.raw_text for t in episode.turns] == policy.answers["executor"] + [" stop; False"]
    assert [t.claimed_done for t in episode.turns] == [False, True, False, False, False]


# --- batches ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 3, 10, 16])
def test_a_panel_of_any_length_is_played_once_through_any_number_of_slots(size):
    pool, policy = FakePool(size, 5), random_policy()
    episodes = play(policy, pool, PANEL)
    assert pool.resets == PANEL
    assert sorted((e.task, e.variation) for e in episodes) == PANEL
    assert max(policy.batches) == min(size, len(PANEL)) and not pool.running


def test_a_free_slot_takes_the_next_episode_while_the_others_go_on():
    pool, policy = FakePool(2, 4), Scripted()
    play(policy, pool, [("boil", 1), ("boil", 0), ("melt", 0)])  # 5, 4 and 4 steps
    mixed = [c for c in pool.calls if len(c) == 1 and next(iter(c.values()))[0] == "reset"]
    assert mixed == [{1: ("reset", "melt", 0)}]
    assert set(policy.batches) == {1, 2} and policy.batches[0] == 2


def test_an_empty_panel_plays_nothing():
    assert play(panel=[]) == []


@pytest.mark.parametrize("history", ["progress", "window"])
def test_results_do_not_depend_on_the_number_of_slots_or_the_order_of_the_panel(history):
    def results(size, panel):
        episodes = play(random_policy(), FakePool(size, 7), panel, history=history, seed=5)
        return {(e.task, e.variation): dataclasses.replace(e, decisions=[]) for e in episodes}

    alone = {pair: result for pair in PANEL for pair, result in results(1, [pair]).items()}
    assert results(3, PANEL) == results(16, PANEL[::-1]) == alone


def test_counts_add_up_per_role():
    counts, policy = Counts(), random_policy()
    episodes = play(policy, FakePool(3, 7), PANEL, counts=counts)
    assert counts.steps == sum(len(e.turns) for e in episodes)
    for role in MAX_NEW_TOKENS:
        prompts = policy.prompts(role)
        assert counts.decisions[role] == len(prompts) > 0
        assert counts.prompt_tokens[role] == sum(map(len, prompts)) and counts.completion_tokens[
            role
        ] == 2 * len(prompts)


# --- sampling -----------------------------------------------------------------------------------------------
def test_sampling_seeds_depend_on_seed_task_variation_turn_and_role_alone():
    policy = Scripted(executor=[" a; False", " b; True", " c; False"])
    play(policy, seed=3)
    asked = [
        ("planner", 0),
        ("executor", 0),
        ("progress", 1),
        ("executor", 1),
        ("progress", 2),
        ("planner", 2),
    ]
    asked += [("executor", 2), ("progress", 3), ("executor", 3)]
    assert [(r.role, r.seed) for r in policy.requests] == [
        (role, episode_seed(3, "boil", 0, t, role)) for role, t in asked
    ]
    assert len({r.seed for r in policy.requests}) == len(policy.requests)


def test_every_part_changes_the_seed_and_the_same_parts_give_it_on_every_machine():
    parts = (3, "boil", 0, 1, "planner")
    others = [
        (4, *parts[1:]),
        (3, "melt", *parts[2:]),
        (3, "boil", 1, 1, "planner"),
        (3, "boil", 0, 2, "planner"),
    ]
    seeds = [episode_seed(*p) for p in [parts, *others, (3, "boil", 0, 1, "executor")]]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 5514386737086353386


def test_every_role_has_its_own_limit_of_new_tokens():
    policy = Scripted()
    play(policy)
    assert {r.role: r.max_new_tokens for r in policy.requests} == MAX_NEW_TOKENS


# --- acting and training see the same -----------------------------------------------------------------------
@pytest.mark.parametrize("history", ["progress", "full", "window"])
@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("ends", ENDS)
def test_training_builds_exactly_the_prompts_that_acting_used_and_keeps_what_was_sampled(
    history, end, ends, tmp_path
):
    options = {"history": history, "max_actions": 6, "ends": ends, "judge": coin}
    for pair in PANEL:
        policy = random_policy()
        (episode,) = play(policy, FakePool(1, 11, end), [pair], **options)
        write_episodes(tmp_path / "a.jsonl", [episode])
        items = transitions(read_episodes(tmp_path / "a.jsonl")[0], history, flat=ends == "episode")
        assert [(t.level, t.prompt) for t in items] == [(r.role, r.prompt) for r in policy.requests]
        assert [t.completion_ids for t in items] == [[n, 2] for n in range(1, len(items) + 1)]
        assert all(t.behavior_logprobs == [-0.1235, -1.0] for t in items)
        assert [t.completion for t in items] == [policy.answers[r.role](r) for r in policy.requests]


@pytest.mark.parametrize("history", ["progress", "full", "window"])
@pytest.mark.parametrize("ends", ENDS)
def test_a_next_prompt_is_the_prompt_that_acting_used_next(history, ends):
    checked, options = dict.fromkeys(MAX_NEW_TOKENS, 0), {"max_actions": 6, "ends": ends, "judge": coin}
    for episode in play(random_policy(), FakePool(4, 11), PANEL, history=history, **options):
        starts = [s.start for s in episode.segments]
        for level in MAX_NEW_TOKENS:
            items = [t for t in transitions(episode, history, flat=ends == "episode") if t.level == level]
            for now, after in zip(items, items[1:], strict=False):
                if not now.terminated and (level == "planner" or after.turn not in starts):
                    assert now.next_prompt == after.prompt and now.follows is after
                    checked[level] += 1
    assert (checked.pop("progress") > 20) == (history == "progress")
    assert (checked.pop("planner") >= 10) == (ends != "episode") and checked["executor"] > 10


@pytest.mark.parametrize("ends", ["claim", "judge", "cap"])
def test_progress_that_is_handed_over_leads_to_the_prompt_the_planner_got_next(ends):
    policy, handed = random_policy(), 0
    options = {"max_actions": 3, "ends": ends, "judge": coin}
    for episode in play(policy, FakePool(4, 11), PANEL, **options):
        items = transitions(episode, credit=Credit(progress="planner"))
        plans = {t.turn: t for t in items if t.level == "planner"}
        for t in items:
            if t.next_level != t.level:
                assert t.next_prompt == plans[t.turn + 1].prompt and t.follows is plans[t.turn + 1]
                assert t.next_prompt in policy.prompts("planner")
                handed += 1
    assert handed > 20


@pytest.mark.parametrize("ends", ENDS)
def test_results_do_not_depend_on_the_number_of_slots_whatever_ends_a_subtask(ends):
    def results(size):
        episodes = play(random_policy(), FakePool(size, 7), PANEL, ends=ends, judge=coin, max_actions=3)
        return {(e.task, e.variation): dataclasses.replace(e, decisions=[]) for e in episodes}

    assert results(1) == results(3)


# --- exploring ----------------------------------------------------------------------------------------------
def test_a_curious_planner_begins_with_another_word_or_speaks_of_another_thing():
    def curious(epsilon):
        policy = Scripted(planner=lambda r: " the pot" if r.begun in (" get", " go") else " get it")
        plans = ["get the cup", "get the cup", "get the jar", "go home"]
        make = lambda _, *usual: Curious(*usual, epsilon=epsilon, plans=plans)  # noqa: E731
        (episode,) = play(policy, FakePool(1, 200), ends="cap", max_actions=1, make=make)
        texts = [s.subtask for s in episode.segments]
        sampled = [bool(d.ids) for d in episode.decisions if d.level == "planner"]
        assert sampled == [text == "get it" for text in texts], "what was put in its mouth is no sample"
        return Counter(texts)

    assert set(curious(0.0)) == {"get it"}
    found = curious(1.0)
    assert set(found) == {"get the pot", "go the pot", "get the cup", "get the jar"}, "not to go"
    assert 70 < found["get the cup"] + found["get the jar"] < 130, "half of the time"
    assert found["get the cup"] > found["get the jar"], "as often as among the plans"
    assert 30 < 200 - curious(0.3)["get it"] < 90
    assert curious(0.3) == curious(0.3), "it is drawn from the request's seed"


# --- giving up ----------------------------------------------------------------------------------------------
def test_an_episode_is_cut_off_when_a_subtask_was_given_so_many_times():
    def give_up(times):
        policy = Scripted(planner=[" a", " b", " a", " a", " b"])
        make = lambda _, *usual: Player(*usual, give_up=times)  # noqa: E731
        (episode,) = play(policy, FakePool(1, 6), ends="cap", max_actions=1, make=make)
        return [s.subtask for s in episode.segments], [t.truncated for t in episode.turns]

    assert give_up(0) == (["a", "b", "a", "a", "b", "b"], [False] * 6)
    assert give_up(3) == (["a", "b", "a", "a"], [False, False, False, True])
    assert give_up(2) == (["a", "b", "a"], [False, False, True])
    assert give_up(1) == (["a"], [True])


# --- an expert in place of one level ------------------------------------------------------------------------
EXPERT = Episode(
    "fake", "boil", 0, "Do boil 0.",
    [Turn("o", action, "", 0.0, False, False) for action in ("a1", "a2", "b1")],
    [Segment("goal a", 0, 2, ""), Segment("goal b", 2, 3, "")],
)  # fmt: skip


def guided(guide, policy, judge=lambda subtask, obs: False, length=6):
    def make(place, *usual):
        return Guided(*usual, expert=EXPERT, guide=guide)

    (episode,) = play(policy, FakePool(1, length), judge=judge, max_actions=2, make=make)
    return episode


def test_an_experts_subtask_stands_until_the_judge_verifies_it_then_comes_the_next_then_the_planners_own():
    episode = guided("planner", Scripted(), judge=lambda subtask, obs: "number 4" in obs or "number 6" in obs)
    assert [(s.subtask, s.start, s.end) for s in episode.segments] == [
        ("goal a", 0, 2), ("goal a", 2, 4), ("goal b", 4, 6),
    ]  # fmt: skip
    more = guided("planner", Scripted(), judge=lambda subtask, obs: True, length=8)
    assert [s.subtask for s in more.segments][:2] == ["goal a", "goal b"]
    assert all(s.subtask.startswith("goal ") and s.subtask[-1] in "012" for s in more.segments[2:])


def test_an_expert_acts_where_its_subtask_is_named_and_claims_at_its_end():
    policy = Scripted(planner=[" goal x", " goal b", " goal a", " goal b"])
    episode = guided("executor", policy)
    assert [(s.subtask, s.start, s.end) for s in episode.segments] == [
        ("goal x", 0, 2), ("goal b", 2, 3), ("goal a", 3, 5), ("goal b", 5, 6),
    ]  # fmt: skip
    assert [t.action for t in episode.turns] == ["go", "go", "b1", "a1", "a2", "go"]
    assert [t.claimed_done for t in episode.turns] == [False, False, True, False, True, False]
    sampled = [bool(d.ids) for d in episode.decisions if d.level == "executor"]
    assert sampled == [True, True, False, False, False, True], "an expert's words carry no sampled tokens"
