"""critic.py: GAE and hierarchical advantages, by golden vectors, known limits and an exact tabular SMDP."""

import math

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


# --- an exact tabular SMDP ---------------------------------------------------------------------------------
def test_exact_critics_give_unbiased_advantages_of_less_variance_than_flat_ones():
    """Two goals, a walk of random length under each, a noisy reward at its end, one more goal: with exact
    values HAE at lambda 1 has the true mean at every low turn, and less variance than the flat return."""
    generator, p = torch.Generator().manual_seed(0), T([0.3, 0.7])  # to win a segment of goal 0, of goal 1
    v_segment = p  # gamma is 1: the value of a segment is its chance
    v_high = {0: 2 * v_segment.mean().item(), 1: v_segment.mean().item(), 2: 0.0}  # by segments done
    errors = {"hae": [], "flat": []}
    for _ in range(4000):
        goals = torch.randint(2, (2,), generator=generator)
        wins = (torch.rand(2, generator=generator) < p[goals]).float()
        lengths = 1 + torch.randint(3, (2,), generator=generator)
        n = int(lengths.sum())
        reward, switch = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        reward[lengths[0] - 1], reward[-1] = wins[0], reward[-1] + wins[1]
        switch[[0, int(lengths[0])]] = True
        which = torch.repeat_interleave(torch.arange(2), lengths)
        low_values = v_segment[goals][which] + T([v_high[1], v_high[2]])[which]
        high_values = T([v_high[0], v_high[1]])[which]
        low, _ = hierarchical_gae(reward, switch, low_values, high_values, 1.0, 1.0, 1.0)
        errors["hae"].append(low[0].item())
        errors["flat"].append((reward.sum() - low_values[0]).item())  # the true advantage of a walk is 0
    hae, flat = T(errors["hae"]), T(errors["flat"])
    assert abs(hae.mean()) < 4 * hae.std() / len(hae) ** 0.5
    assert abs(flat.mean()) < 4 * flat.std() / len(flat) ** 0.5
    assert hae.var() < 0.6 * flat.var()  # the second segment's noise is gone
