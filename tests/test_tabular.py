"""Offline RL on a corridor small enough to solve: Learner's Q and V against dynamic programming.

Rooms 0 to 4, then the exit. The planner sends the executor one or two rooms on; the executor walks or rests,
and after CAP actions its subtask is over. Episodes are real ones, and so is the whole way to the values:
transitions, collate, Learner. The language model alone is a stand-in: its hidden state is the one-hot of
the tokens so far, and heads are linear, so that Q and V are tables. What they should be is solved from the
corridor's own log, which shares no code with them.
"""

import copy
import functools
import itertools
import math
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from batches import collate
from critic import Critics
from data import Episode, Segment, Turn, set_returns, transitions
from learner import Learner, RLConfig

torch.set_num_threads(1)
EXIT, CAP, GAMMA, SIZE = 5, 4, 0.8, 256
LEVELS = ("planner", "executor")
mean = torch.mean  # of the Q of a state's decisions, as often as the data made them


# --- the corridor -------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """What one decision brought; state and action in the corridor's own words."""

    level: str
    state: object  # planner: room; executor: (target, room)
    action: object  # planner: target; executor: rooms walked, 0 or 1
    reward: float
    steps: int
    after: object  # the next state; None: the end


def earned(room, walked):
    """Reward of the world: a rest costs 0.05, room 2 costs 0.2, the exit gives 1."""
    return {2: -0.2, EXIT: 1.0}.get(room, 0.0) if walked else -0.05


def play(choose, room=0, cap=CAP):
    """One episode and its log. choose(level) -> rooms to go on, 1 or 2; rooms to walk, 0 or 1."""
    episode, rows = Episode("corridor", "leave", 0, "Your task is to leave."), []
    turns = episode.turns
    while room != EXIT:
        begin, first, target, acted = len(turns), room, min(room + choose("planner"), EXIT), []
        while room != target and len(turns) - begin < cap:
            walked = choose("executor")
            before, room = room, room + walked
            turns.append(
                Turn(
                    f"\n\nroom {before}", ("rest", "walk")[walked], "", earned(room, walked), room == EXIT,
                    False, f"go to room {target}", claimed_done=room == target, verified_done=room == target,
                )
            )  # fmt: skip
            after = None if room == target else (target, room)
            acted.append(Row("executor", (target, before), walked, float(room == target), 1, after))
        reward, end = sum(turn.reward for turn in turns[begin:]), len(turns)
        rows.append(Row("planner", first, target, reward, end - begin, None if room == EXIT else room))
        rows += acted
        episode.segments.append(Segment(f"go to room {target}", begin, end, ""))
    episode.final_obs = f"\n\nroom {room}"
    return episode, rows


@functools.cache
def random_data():
    """45 episodes from all rooms: far with probability 0.4, walk with 0.7."""
    dice = random.Random(0)

    def choose(level):
        return 1 + (dice.random() < 0.4) if level == "planner" else int(dice.random() < 0.7)

    return [play(choose, room=i % EXIT) for i in range(45)]


@functools.cache
def even_data():
    """Every sequence of four choices of the planner once: near and far are even, whatever came before."""
    data = []
    for bits in itertools.product((1, 2), repeat=4):
        plan = iter(bits)
        data.append(play(lambda level, plan=plan: next(plan, 1) if level == "planner" else 1))
    return data


def cut(episode):
    """The same turns as episodes of one subtask each: a step limit cuts off all but the last."""
    for segment in episode.segments:
        turns = copy.deepcopy(episode.turns[segment.start : segment.end])
        turns[-1].truncated = not turns[-1].terminated
        whole = Segment(segment.subtask, 0, len(turns), "")
        yield replace(episode, turns=turns, segments=[whole], final_obs=episode.obs_after(segment.end - 1))


def decisions_of(episodes):
    return [t for e in episodes for t in transitions(e) if t.level in LEVELS]


# --- dynamic programming ------------------------------------------------------------------------------------
def expectile(share):
    """V such that share * E[(Q - V)+] = (1 - share) * E[(V - Q)+], by bisection."""

    def of(q):
        low, high = q.min(), q.max()
        for _ in range(30):
            v = (low + high) / 2
            above = share * (q - v).clamp(min=0).sum() > (1 - share) * (v - q).clamp(min=0).sum()
            low, high = (v, high) if above else (low, v)
        return (low + high) / 2

    return of


def solve(rows, value=mean, discount="subtask", asked=None):
    """Value iteration on the log: Q(s,a) = E[r + rate * V(s')], V(s) = value(Q(s,u) of the decisions in s).

    u: the action of the decision, or of the same row of `asked`.
    """
    v = defaultdict(float)  # (level, state) -> V
    pairs, visits = defaultdict(list), defaultdict(list)
    for row, u in zip(rows, asked or rows, strict=True):
        pairs[row[:3]].append(row)
        visits[row[:2]].append(u[:3])
    for _ in range(60):
        q = {}
        for pair, same in pairs.items():
            rate = [0 if r.after is None else GAMMA ** (r.steps if discount == "smdp" else 1) for r in same]
            q[pair] = sum(r.reward + g * v[r.level, r.after] for r, g in zip(same, rate, strict=True)) / len(
                same
            )
        assert all((r.level, r.after) in visits for r in rows if r.after is not None), "a state without data"
        v.update({state: float(value(torch.tensor([q[p] for p in seen]))) for state, seen in visits.items()})
    return q, {state: v[state] for state in visits}


def linear_solve(rows):
    """V = R + P V of the log, P with its discount: the value of the policy that made the data."""
    index = {state: i for i, state in enumerate(dict.fromkeys(row[:2] for row in rows))}
    P, R, count = torch.zeros(len(index), len(index)), torch.zeros(len(index)), torch.zeros(len(index))
    for row in rows:
        i = index[row[:2]]
        R[i], count[i] = R[i] + row.reward, count[i] + 1
        if row.after is not None:
            P[i, index[row.level, row.after]] += GAMMA
    v = torch.linalg.solve(torch.eye(len(index)) - P / count[:, None], R / count)
    return dict(zip(index, v.tolist(), strict=True))


# --- tables in place of the language model ------------------------------------------------------------------
class Words:
    """One token per prompt, for what it says of the state alone, and one per answer."""

    bos_token_id, eos_token_id, pad_token_id = None, 0, 0

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens):
        state = [line for line in text.split("\n") if not line.startswith(("Finished", "Progress"))]
        return SimpleNamespace(
            input_ids=[1 + self.ids.setdefault("\n".join(state), len(self.ids))] * bool(text)
        )


class Tables(nn.Module):
    """A policy whose hidden state is the one-hot of the tokens so far."""

    def __init__(self):
        super().__init__()
        self.config, self.head, self.seen = SimpleNamespace(), nn.Linear(SIZE, SIZE), {}

    def get_output_embeddings(self):
        return self.head

    def hidden(self, ids, attention_mask=None, **positions):
        """attention_mask (B, 1, T, T), of packed rows: 0 where a token sees another."""
        rows, (B, T) = ids.tolist(), ids.shape
        sees = torch.ones(B, T, T).tril() > 0 if attention_mask is None else attention_mask[:, 0] == 0
        code = [
            [self.seen.setdefault(tuple(r[i] for i in range(T) if seen[i]), len(self.seen)) for seen in mask]
            for r, mask in zip(rows, sees.tolist(), strict=True)
        ]
        return nn.functional.one_hot(torch.tensor(code), SIZE).float()


def train(decisions, rows, steps=120, asked=None, **config):
    """Learner's Q and V, by the names of the log, after full-batch steps (Rprop: each entry at its own pace).

    asked: the rows with the actions of the policy, with value_answers="policy".
    """
    words, policy, critics = Words(), Tables(), Critics(SIZE)
    for heads in (critics.online.q, critics.online.v):
        for level in heads:
            heads[level] = nn.Linear(SIZE, 1, bias=False)
            nn.init.zeros_(heads[level].weight)
    critics.target = copy.deepcopy(critics.online).requires_grad_(False)
    answers = None
    if asked:
        texts = {row[:3]: t.completion for t, row in zip(decisions, rows, strict=True)}
        sampled = [words(texts[u[:3]], False).input_ids + [0] for u in asked]
        answers = {id(t): ids for t, ids in zip(decisions, sampled, strict=True)}
    batch = collate(decisions, words, config.get("bootstrap") == "next_q", answers)
    config = RLConfig(**{"gamma": GAMMA, "polyak": 1.0, "clip_norm": math.inf} | config)
    learner = Learner(
        policy, critics, lambda policy, ids, level, **inputs: policy.hidden(ids, **inputs), config
    )
    learner.critic_optimizer = torch.optim.Rprop(learner.critic_parameters, lr=0.1)
    for _ in range(steps):
        learner.update([batch], train_actor=False)
    d = learner.decide(batch, train_actor=False)
    q = {row[:3]: value for row, value in zip(rows, d.q.tolist(), strict=True)}
    return q, {row[:2]: value for row, value in zip(rows, d.v.tolist(), strict=True)}


def fit(data, **config):
    """(Q, V) learned, and the log."""
    rows = [row for _, log in data for row in log]
    return train(decisions_of([episode for episode, _ in data]), rows, **config), rows


def close(found, expected, tolerance=2e-4):
    assert found.keys() == expected.keys()
    worst = max(found, key=lambda key: abs(found[key] - expected[key]))
    assert abs(found[worst] - expected[worst]) < tolerance, (worst, found[worst], expected[worst])


def apart(a, b, level="planner", by=0.05):
    return max(abs(a[key] - b[key]) for key in a if key[0] == level) > by


# --- data ---------------------------------------------------------------------------------------------------
def test_transitions_are_the_log_of_the_corridor():
    for episode, rows in random_data():
        for t, row in zip(decisions_of([episode]), rows, strict=True):
            assert (t.level, t.reward, t.steps) == (row.level, pytest.approx(row.reward), row.steps)
            assert t.terminated == (row.after is None)
    capped = [r for _, rows in random_data() for r in rows if r.level == "planner" and r.steps == CAP]
    assert any(row.after not in (None, row.action) for row in capped), "some subtasks end at the cap"


@pytest.mark.parametrize(
    ("discount", "planner"),  # far, near, far: rewards -0.2, 0, 1 in 2, 1, 2 steps
    [
        ("subtask", [-0.2 + 0.8 * (0 + 0.8 * 1), 0 + 0.8 * 1, 1]),
        ("smdp", [-0.2 + 0.64 * (0 + 0.8 * 1), 0 + 0.8 * 1, 1]),
    ],
)
def test_monte_carlo_returns_by_hand(discount, planner):
    plan = iter((2, 1, 2))
    episode, _ = play(lambda level: next(plan) if level == "planner" else 1)
    decisions = decisions_of([episode])
    set_returns(decisions, GAMMA, discount)
    returns = {level: [t.mc_return for t in decisions if t.level == level] for level in LEVELS}
    assert returns["planner"] == pytest.approx(planner)
    assert returns["executor"] == pytest.approx([0.8, 1, 1, 0.8, 1])  # to the end of its own subtask
    assert [t.reward for t in decisions if t.level == "executor"] == [0, 1, 1, 0, 1]


def test_monte_carlo_returns_of_what_a_step_limit_cut_off_are_not_known():
    plan = iter((2, 1, 2))
    episode, _ = play(lambda level: next(plan) if level == "planner" else 1)
    first, *_, last = cut(episode)
    first.turns.pop()  # within its subtask
    first.turns[-1].truncated, first.segments[0].end, first.final_obs = True, 1, "\n\nroom 1"
    decisions = decisions_of([first]) + decisions_of([last])
    set_returns(decisions, GAMMA, "subtask")
    assert [(t.level, t.truncated) for t in decisions[:2]] == [("planner", True), ("executor", True)]
    assert all(math.isnan(t.mc_return) for t in decisions[:2])
    assert [t.mc_return for t in decisions[2:]] == pytest.approx([1, 0.8, 1])


@pytest.mark.parametrize("discount", ["subtask", "smdp"])
def test_the_mean_monte_carlo_return_is_the_value_of_the_policy_that_made_the_data(discount):
    data = even_data()
    decisions, rows = decisions_of([e for e, _ in data]), [row for _, log in data for row in log]
    set_returns(decisions, GAMMA, discount)
    returns = defaultdict(list)
    for t, row in zip(decisions, rows, strict=True):
        returns[row[:2]].append(t.mc_return)
    close({state: sum(g) / len(g) for state, g in returns.items()}, solve(rows, discount=discount)[1], 1e-5)


# --- Q and V converge to dynamic programming ----------------------------------------------------------------
@functools.cache
def behaviour():
    return fit(random_data(), expectile=0.5)


def test_expectile_one_half_is_the_value_of_the_policy_that_made_the_data():
    (q, v), rows = behaviour()
    exact_q, exact_v = solve(rows)
    close(exact_v, linear_solve(rows), 1e-5)
    close(v, exact_v)
    close(q, exact_q)


@pytest.mark.parametrize(("share", "side"), [(0.8, "upper"), (0.97, "upper"), (0.97, "lower")])
def test_an_expectile_near_one_is_the_best_or_the_worst_action_of_the_data(share, side):
    (q, v), rows = fit(random_data(), expectile=share, expectile_side=side)
    exact_q, exact_v = solve(rows, expectile(share if side == "upper" else 1 - share))
    close(v, exact_v)
    close(q, exact_q)
    extreme, average = solve(rows, torch.max if side == "upper" else torch.min)[1], solve(rows)[1]
    to_extreme, to_average = (sum(abs(v[s] - other[s]) for s in v) for other in (extreme, average))
    assert (to_extreme < 0.25 * to_average) == (share > 0.9), "0.8 is only on its way there"
    assert all((v[s] - average[s]) * (1 if side == "upper" else -1) > -2e-4 for s in v)


def test_one_gamma_per_subtask_and_one_per_step_are_two_values_each_exact():
    (_, subtask), rows = behaviour()
    (_, smdp), _ = fit(random_data(), expectile=0.5, discount="smdp")
    close(smdp, solve(rows, discount="smdp")[1])
    assert apart(subtask, smdp, by=0.1)
    assert not apart(subtask, smdp, "executor", by=2e-4), "an action is one step either way"


def test_a_step_limit_changes_no_value_and_taking_it_for_the_end_does():
    (_, uncut), rows = behaviour()
    decisions = decisions_of(part for episode, _ in random_data() for part in cut(episode))
    limits = [t.level == "planner" and t.truncated for t in decisions]
    assert 0.2 < sum(limits) / len(limits) < 0.5
    close(train(decisions, rows, expectile=0.5)[1], uncut)
    ended = [replace(t, terminated=t.terminated or t.truncated) for t in decisions]
    wrong_rows = [r._replace(after=None) if t.terminated else r for t, r in zip(ended, rows, strict=True)]
    wrong = train(ended, wrong_rows, expectile=0.5)[1]
    close(wrong, solve(wrong_rows)[1])
    assert apart(wrong, uncut, by=0.3) and apart(wrong, uncut, "executor", by=0.02)


def test_a_bootstrap_from_the_next_answer_of_the_data_finds_the_same_value():
    (q, v), rows = fit(even_data(), expectile=0.5, bootstrap="next_q")
    exact_q, exact_v = solve(rows)
    close(q, exact_q)
    close(v, exact_v)


@pytest.mark.parametrize(
    ("far", "room_0", "room_1"), [(0, 0.2496, 0.312), (0.75, None, None), (1, 0.44, 0.6)]
)
def test_answers_of_another_policy_give_that_policy_s_expectation_of_q(far, room_0, room_1):
    """The policy goes far with this probability; the data go near as often as far."""
    rows, asked = [row for _, log in even_data() for row in log], []
    for i, row in enumerate(rows):
        goes_far = sum(other[:2] == row[:2] for other in rows[:i]) % 4 < 4 * far
        plan = min(row.state + 1 + goes_far, EXIT) if row.level == "planner" else row.action
        asked.append(row._replace(action=plan))
    (q, v), _ = fit(even_data(), expectile=0.5, value_answers="policy", asked=asked)
    exact_q, exact_v = solve(rows, asked=asked)
    close(v, exact_v)
    close(q, exact_q)
    assert apart(v, solve(rows)[1], by=0.03)
    if room_0:  # near: -0.2 on entering room 2, then 1; far: over rooms 2 and 4, or over room 3
        assert [v["planner", room] for room in (0, 1)] == pytest.approx([room_0, room_1], abs=2e-4)


def test_a_slow_target_network_reaches_the_same_fixed_point():
    (q, v), _ = behaviour()
    (slow_q, slow_v), _ = fit(random_data(), expectile=0.5, polyak=0.2, steps=200)
    close(slow_v, v)
    close(slow_q, q)
    (_, frozen), _ = fit(random_data(), expectile=0.5, polyak=0.0, steps=100)
    assert apart(frozen, v)
