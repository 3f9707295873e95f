"""critic.py: GAE and hierarchical advantages, by golden vectors, known limits and an exact tabular SMDP."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critic import gae, hierarchical_gae, switch_advantage, switch_advantage_released

T = torch.tensor


def reference(r, switch, v_low, v_high, gamma, lam, lam_segment, final_low=0.0, final_high=0.0):
    """HAE written from the sums, not the recursions: -> (low, {start: high}, return to the segment's end)."""
    n = len(r)
    bounds = [0, *(t for t in range(1, n) if switch[t]), n]
    low, high, returns, deltas = [0.0] * n, {}, [0.0] * n, []
    for s, e in zip(bounds, bounds[1:], strict=False):
        end_low = v_high[e] if e < n else final_low
        end_high = v_high[e] if e < n else final_high
        delta = [r[t] + gamma * (v_low[t + 1] if t + 1 < e else end_low) - v_low[t] for t in range(s, e)]
        for t in range(s, e):
            low[t] = sum((gamma * lam) ** i * delta[t - s + i] for i in range(e - t))
            returns[t] = sum(gamma**i * r[t + i] for i in range(e - t)) + gamma ** (e - t) * end_high
        reward = sum(gamma**i * r[s + i] for i in range(e - s))
        deltas.append((s, e, reward + gamma ** (e - s) * end_high - v_high[s]))
    for k, (s, _, _) in enumerate(deltas):
        high[s] = sum(gamma ** (start - s) * lam_segment**i * d for i, (start, _, d) in enumerate(deltas[k:]))
    return low, high, returns


# --- golden vectors (arXiv:2602.16165; the released code gives the same to 8e-7) ----------------------------
REWARD, SWITCH = T([0.0, 0, 0, 0, 0, 1]), T([1, 0, 1, 0, 0, 1]).bool()
V_LOW, V_HIGH = T([0.30, 0.40, 0.45, 0.55, 0.65, 0.80]), T([0.25, 0.35, 0.50, 0.60, 0.70, 0.75])
V_TERM = T([0.28, 0.38, 0.48, 0.58, 0.68, 0.78])
GOLDEN = [
    (0.9, 0.95, [0.102750, 0.05, 0.093201, 0.056375, 0.025, 0.2],
     [0.324203, 0.219887, 0.25], [0.125, 0.07, 0.06675, 0.0275, -0.005, 0.22]),
    (1.0, 1.0, [0.2, 0.1, 0.3, 0.2, 0.1, 0.2],
     [0.713125, 0.4875, 0.25], [0.22, 0.12, 0.27, 0.17, 0.07, 0.22]),
]  # fmt: skip


@pytest.mark.parametrize("gamma, lam, low, high, term", GOLDEN)
def test_golden_vectors(gamma, lam, low, high, term):
    found_low, found_high = hierarchical_gae(REWARD, SWITCH, V_LOW, V_HIGH, gamma, lam, 0.95)
    assert found_low.tolist() == pytest.approx(low, abs=2e-6)
    assert found_high[SWITCH].tolist() == pytest.approx(high, abs=2e-6)
    assert found_high[~SWITCH].isnan().all()
    found = switch_advantage_released(REWARD, SWITCH, V_HIGH, V_TERM, gamma)
    assert found.tolist() == pytest.approx(term, abs=2e-6)


# --- known limits -------------------------------------------------------------------------------------------
@st.composite
def episodes(draw):
    n = draw(st.integers(1, 9))
    number = st.floats(-2, 2, width=32)
    rows = [draw(st.lists(number, min_size=n, max_size=n)) for _ in range(4)]
    switch = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return *map(T, rows), T(switch), draw(number), draw(number)


@settings(max_examples=60, deadline=None)
@given(episodes(), st.floats(0.5, 1), st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_sum_of_the_equations(episode, gamma, lam, lam_segment):
    reward, v_low, v_high, v_term, switch, final_low, final_high = episode
    low, high = hierarchical_gae(
        reward, switch, v_low, v_high, gamma, lam, lam_segment, final_low, final_high
    )
    lists = [x.tolist() for x in (reward, switch, v_low, v_high)]
    expected = reference(*lists, gamma, lam, lam_segment, final_low, final_high)
    assert low.tolist() == pytest.approx(expected[0], abs=1e-3)
    assert {t: x for t, x in enumerate(high.tolist()) if not math.isnan(x)} == pytest.approx(
        expected[1], abs=1e-3
    )
    term = switch_advantage_released(reward, switch, v_high, v_term, gamma, final_high)
    assert (term + v_term).tolist() == pytest.approx(expected[2], abs=1e-3)


def plain(reward, value, final, gamma, lam):
    n = len(reward)
    after = torch.cat([value[1:], T([final])])
    return gae(reward, value, after, torch.full((n,), gamma * lam), torch.full((n,), gamma))


def test_segments_of_one_turn_are_plain_gae_at_the_high_level_and_td_at_the_low():
    always = torch.ones(6, dtype=torch.bool)
    low, high = hierarchical_gae(REWARD, always, V_LOW, V_HIGH, 0.9, 0.95, 0.8, 0.3, 0.4)
    assert torch.allclose(high, plain(REWARD, V_HIGH, 0.4, 0.9, 0.8))
    after = torch.cat([V_HIGH[1:], T([0.3])])
    assert torch.allclose(low, REWARD + 0.9 * after - V_LOW)


def test_one_segment_is_flat_gae_at_the_low_level_and_one_return_at_the_high():
    never = torch.zeros(6, dtype=torch.bool)
    low, high = hierarchical_gae(REWARD, never, V_LOW, V_HIGH, 0.9, 0.95, 0.8, 0.3, 0.4)
    assert torch.allclose(low, plain(REWARD, V_LOW, 0.3, 0.9, 0.95))
    assert high[0].item() == pytest.approx(0.9**5 + 0.9**6 * 0.4 - 0.25) and high[1:].isnan().all()


def test_a_limit_bootstraps_from_the_next_observation_and_an_end_does_not():
    ended, _ = hierarchical_gae(REWARD, SWITCH, V_LOW, V_HIGH, 0.9, 0.95, 0.95)
    cut, high = hierarchical_gae(REWARD, SWITCH, V_LOW, V_HIGH, 0.9, 0.95, 0.95, 0.5, 0.6)
    assert (cut - ended).tolist() == pytest.approx([0, 0, 0, 0, 0, 0.45])  # and is cut at the boundary
    assert high[5].item() == pytest.approx(1 + 0.9 * 0.6 - 0.75)


def test_the_switch_is_judged_as_a_choice_between_two_actions():
    """The mean of the advantage under the policy is 0, and better is to switch where V_high is larger."""
    p, high, keep = T([0.3, 0.3]), T([1.0, 1.0]), T([0.4, 0.4])
    switched, kept = switch_advantage(T([True, False]), p, high, keep)
    assert switched > 0 > kept and 0.3 * switched + 0.7 * kept == pytest.approx(0, abs=1e-7)


# --- an exact tabular SMDP ----------------------------------------------------------------------------------
STATES, GOALS, ACTIONS, GAMMA, END, STOP = 4, 2, 2, 0.95, 0.08, 0.35  # chances to end, to drop the subgoal


def smdp() -> dict[str, torch.Tensor]:
    """Random transitions and rewards, a uniform policy, and its exact values by a linear system."""
    generator = torch.Generator().manual_seed(1)
    to = torch.rand(STATES, GOALS, ACTIONS, STATES, generator=generator, dtype=torch.float64)
    to /= to.sum(-1, keepdim=True)
    reward = torch.randn(STATES, GOALS, ACTIONS, generator=generator, dtype=torch.float64)
    # V_low(s,o) = E_a[r + gamma (1 - end) E_s'[(1 - stop) V_low(s',o) + stop V_high(s')]], V_high = E_o V_low
    n = STATES * GOALS
    after = torch.zeros(STATES, GOALS, ACTIONS, n, dtype=torch.float64)
    for goal in range(GOALS):
        for other in range(GOALS):
            share = STOP / GOALS + (1 - STOP) * (goal == other)
            after[:, goal, :, other::GOALS] = share * to[:, goal]
    step = GAMMA * (1 - END) * after
    v = torch.linalg.solve(
        torch.eye(n, dtype=torch.float64) - step.mean(2).view(n, n), reward.mean(2).view(n)
    )
    low = v.view(STATES, GOALS)
    return {"to": to, "reward": reward, "low": low, "high": low.mean(1), "q": reward + step @ v}


def one_episode(world: dict, rng) -> tuple[torch.Tensor, ...]:
    """-> states, subgoals, switches, first action, rewards with noise, until the world ends."""
    state, goal, switched, rows, first = rng.randrange(STATES), rng.randrange(GOALS), True, [], None
    while True:
        action = rng.randrange(ACTIONS)
        first = action if first is None else first
        rows.append((state, goal, switched, world["reward"][state, goal, action].item() + rng.gauss(0, 1)))
        if rng.random() < END:
            states, goals, switches, rewards = zip(*rows, strict=True)
            return T(states), T(goals), T(switches), first, T(rewards)
        state = rng.choices(range(STATES), world["to"][state, goal, action].tolist())[0]
        switched = rng.random() < STOP
        goal = rng.randrange(GOALS) if switched else goal


def test_with_exact_critics_hae_is_unbiased_and_has_less_variance_than_flat_gae_and_monte_carlo():
    """Errors of the advantage of the first turn, against its exact value; (2602.16165, theorems 4.2 and 4.3).

    The gain at the low level is Rao-Blackwell: what follows a boundary is replaced by its mean. At the high
    level lambda_segment = 1 is the flat return, exactly; below 1 the variance falls there, too.
    """
    world, rng = smdp(), random.Random(0)
    errors = {name: [] for name in ("monte carlo", "gae", "hae 1", "hae", "high 1", "high")}
    for _ in range(3000):
        states, goals, switches, action, reward = one_episode(world, rng)
        low, high = world["low"][states, goals].float(), world["high"][states].float()
        true = (world["q"][states[0], goals[0], action] - world["low"][states[0], goals[0]]).item()
        outcome = (GAMMA ** torch.arange(len(reward)) * reward).sum().item()
        errors["monte carlo"].append(outcome - low[0].item() - true)
        errors["gae"].append(plain(reward, low, 0.0, GAMMA, 0.95)[0].item() - true)
        found = {lam: hierarchical_gae(reward, switches, low, high, GAMMA, lam, lam) for lam in (0.95, 1.0)}
        errors["hae"].append(found[0.95][0][0].item() - true)
        errors["hae 1"].append(found[1.0][0][0].item() - true)
        of_goal = (world["low"][states[0], goals[0]] - world["high"][states[0]]).item()  # Q_high - V_high
        errors["high"].append(found[0.95][1][0].item() - of_goal)
        errors["high 1"].append(found[1.0][1][0].item() - of_goal)
        assert found[1.0][1][0].item() == pytest.approx(outcome - high[0].item(), abs=1e-3)
    errors = {name: T(e) for name, e in errors.items()}
    for name, e in errors.items():
        assert abs(e.mean()) < 4 * e.std() / len(e) ** 0.5, f"{name} is biased: {e.mean()}"
    variance = {name: e.var().item() for name, e in errors.items()}
    assert variance["hae"] < variance["hae 1"] < variance["gae"] < variance["monte carlo"]
    assert variance["hae 1"] < 0.6 * variance["gae"]
    assert variance["high"] < variance["high 1"]


def test_a_bad_high_value_is_bias_at_the_low_level():
    """Why the values warm up first: what HAE puts for the rest of the episode is only as good as V_high."""
    world, rng, errors = smdp(), random.Random(0), []
    for _ in range(1500):
        states, goals, switches, action, reward = one_episode(world, rng)
        low, high = world["low"][states, goals].float(), world["high"][states].float() + 1.0
        true = (world["q"][states[0], goals[0], action] - world["low"][states[0], goals[0]]).item()
        errors.append(hierarchical_gae(reward, switches, low, high, GAMMA, 1.0, 1.0)[0][0].item() - true)
    error = T(errors)
    assert error.mean() > 6 * error.std() / len(error) ** 0.5
