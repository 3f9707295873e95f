"""Diagnostics: numbers by hand, and alarms that fire on a collapse and are silent on a healthy run."""

import math
import random

import pytest
import torch

from data import LEVELS
from diagnostics import ALARMS, QUANTILES, Watch, alarms, level_quantities, rank_correlation, result_alarms
from learner import Decisions


# --- rank correlation -------------------------------------------------------------------------------------
def slow_spearman(x: list[float], y: list[float]) -> float:
    """Mid-ranks by sorting, then Pearson's correlation of the ranks."""

    def ranks(values):
        ordered = sorted(values)
        return [
            sum(place for place, other in enumerate(ordered) if other == value) / ordered.count(value)
            for value in values
        ]

    a, b = ranks(x), ranks(y)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((i - mean_a) * (j - mean_b) for i, j in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((i - mean_a) ** 2 for i in a) * sum((j - mean_b) ** 2 for j in b))


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([1, 2, 3, 4], [-5, 0, 7, 1000], 1.0),  # ranks alone count
        ([1, 2, 3, 4], [9, 5, 1, -2], -1.0),
        ([1, 2, 3], [1, 3, 2], 0.5),  # 1 - 6 * 2 / (3 * 8)
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 0.5 0.5 2 against 0 1 2
        ([1, 2], [2, 1], -1.0),
    ],
)
def test_rank_correlation_by_hand(x, y, rho):
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    assert rank_correlation(x, y).item() == pytest.approx(rho, abs=1e-6)


def test_rank_correlation_agrees_with_a_slow_reference_with_ties():
    rng = random.Random(0)
    for size in (3, 10, 50):
        x, y = ([float(rng.randint(0, 9)) for _ in range(size)] for _ in range(2))
        found = rank_correlation(torch.tensor(x), torch.tensor(y)).item()
        assert found == pytest.approx(slow_spearman(x, y), abs=1e-5)


def test_rank_correlation_of_a_constant_is_nan():
    x, constant = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.25)
    assert rank_correlation(x, constant).isnan() and rank_correlation(constant, x).isnan()


# --- quantities of a level --------------------------------------------------------------------------------
def decisions(**changes) -> Decisions:
    """Four decisions: an expert's, then three of rollouts, of which the last has no known return."""
    columns = {
        "level": [0, 0, 0, 0], "v": [0.5, 0.0, 0.0, 0.5], "q": [1.0, 0.0, -0.5, 0.5],
        "v_target": [0.0] * 4, "td_target": [0.0] * 4, "advantage": [0.5, 0.0, -0.5, 0.0],
        "weight": [2.0, 1.0, 1.0, 0.0], "logp": [-2.0, -4.0, -6.0, -3.0], "policy_q": [0.0] * 4,
        "policy_logp": [0.0] * 4, "tokens": [4, 2, 3, 1], "expert": [True, False, False, False],
        "behavior_logp": [math.nan, -3.0, -2.0, -4.0], "mc_return": [0.75, 0.5, -1.0, math.nan],
    } | changes  # fmt: skip
    return Decisions(**{name: torch.tensor(values) for name, values in columns.items()})


def quantities(token_norm: str = "sum", **changes) -> dict[str, float]:
    return {name: value.item() for name, value in level_quantities(decisions(**changes), token_norm).items()}


def test_quantities_of_a_level_by_hand():
    found = quantities()
    by_hand = {
        "value_mean": 0.25, "q_mean": 0.25, "advantage_mean": 0.0, "weight_mean": 1.0, "weight_max": 2.0,
        "ess_share": 16 / 6 / 4,  # (2 + 1 + 1)^2 / (4 + 1 + 1), of 4
        "logp_mean": -15 / 10, "logp_expert": -2 / 4, "logp_rollout": -13 / 6,  # per token
        "kl_sft": (1 + 4 - 1) / 3,  # per answer
        "mc_bias": (0.25 - 0.5 + 0.5) / 3,
        "mc_rank_corr": 1.0,  # Q 1, 0, -0.5 and G 0.75, 0.5, -1
    }  # fmt: skip
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert set(found) - set(by_hand) == {f"{n}_p{p:02d}" for n in ("advantage", "weight") for p in QUANTILES}


def test_quantiles_interpolate_between_decisions():
    values = [float(v) for v in range(4)]
    found = quantities(advantage=values[::-1], weight=values)
    for name in ("advantage", "weight"):
        assert [found[f"{name}_p{p:02d}"] for p in (5, 25, 50, 75, 95)] == pytest.approx(
            [0.15, 0.75, 1.5, 2.25, 2.85]
        )


def test_equal_weights_share_the_step_and_no_weight_has_no_share():
    assert quantities(weight=[1.0] * 4)["ess_share"] == pytest.approx(1.0)  # behaviour cloning
    assert quantities(weight=[0.0, 9.0, 0.0, 0.0])["ess_share"] == pytest.approx(0.25)
    assert quantities(weight=[0.5, -0.5, 0.5, -0.5])["ess_share"] == pytest.approx(1.0)  # signed advantages
    assert quantities(weight=[0.0] * 4)["ess_share"] == 0.0


@pytest.mark.parametrize(
    "changes, absent",
    [
        ({"expert": [False] * 4}, {"logp_expert"}),
        ({"expert": [True] * 4}, {"logp_rollout"}),
        ({"behavior_logp": [math.nan] * 4}, {"kl_sft"}),
        ({"mc_return": [math.nan] * 4}, {"mc_bias", "mc_rank_corr"}),
        ({"mc_return": [0.5, 1.0, math.nan, math.nan]}, {"mc_rank_corr"}),  # two are no ranking
        ({"mc_return": [0.5, 0.5, 0.5, math.nan]}, {"mc_rank_corr"}),
    ],
)
def test_what_nothing_defines_is_left_out_and_no_nan_is_logged(changes, absent):
    found = quantities(**changes)
    assert set(quantities()) - set(found) == absent
    assert all(math.isfinite(value) for value in found.values())


def test_token_norm_mean_gives_the_same_log_probabilities():
    per_token = [-2.0 / 4, -4.0 / 2, -6.0 / 3, -3.0 / 1]
    assert quantities("mean", logp=per_token) == pytest.approx(quantities("sum"))


# --- alarms -----------------------------------------------------------------------------------------------
def noisy(value, count: int = 120, noise: float = 0.0, seed: int = 0) -> list[float]:
    """value(step in 0..1) and Gaussian noise, as a run logs it."""
    rng = random.Random(seed)
    return [value(i / (count - 1)) + rng.gauss(0, noise) for i in range(count)]


COLLAPSED = {
    "ess_share": [noisy(lambda t: 1 - 0.97 * t, noise=0.01)],
    "weight_max": [noisy(lambda t: math.exp(12 * t)), [1.0] * 20 + [math.inf] * 20],
    "value_mean": [noisy(lambda t: 0.1 * math.exp(6 * t)), noisy(lambda t: -60 * t)],
    "q_loss": [noisy(lambda t: 0.3 * math.exp(-20 * t) + 0.02 * math.exp(5 * t))],
    "mc_rank_corr": [noisy(lambda t: -0.6 * t, noise=0.4)],
    "logp_expert": [noisy(lambda t: -0.5 - 6 * t, noise=0.9)],
    "kl_sft": [
        noisy(lambda t: 40 * t, noise=2.0),
        noisy(lambda t: 3 * t, noise=0.5),  # as measured
    ],
}
HEALTHY = {  # with the spread between batches that a small level has
    "ess_share": [
        noisy(lambda t: 0.9 - 0.4 * t, noise=0.08),
        [1.0] * 120,  # behaviour cloning
        noisy(lambda t: 0.33, noise=0.08),  # experts alone carry a level that clones them
    ],
    "weight_max": [[20.0] * 120, noisy(lambda t: 0.1, noise=0.3)],  # at its ceiling; signed advantages
    "value_mean": [
        noisy(lambda t: 0.9 * t, noise=0.2),
        noisy(lambda t: -4 * t, noise=0.5),
    ],  # an executor stuck
    "q_loss": [
        noisy(lambda t: 0.5 * math.exp(-8 * t) + 0.02),
        [0.01 if random.Random(i).random() < 0.85 else 0.5 for i in range(120)],  # a reward now and then
        noisy(lambda t: 0.001 + 0.04 * t * t),  # from values at 0: grows, and is small
    ],
    "mc_rank_corr": [
        noisy(lambda t: 0.6 * t, noise=0.4),
        noisy(lambda t: 0.7 * t - 0.4, noise=0.3),  # wrong only while it is untrained
    ],
    "logp_expert": [noisy(lambda t: -1 + 0.5 * t, noise=0.9), noisy(lambda t: -0.3 - 0.2 * t, noise=0.1)],
    "kl_sft": [
        noisy(lambda t: 0.5 * t, noise=0.5),
        noisy(lambda t: 60 * math.exp(-9 * t) + 25, noise=1.0),  # started away from the policy that played
    ],
}


def test_every_alarm_has_cases():
    assert set(COLLAPSED) == set(HEALTHY) == set(ALARMS)


@pytest.mark.parametrize("quantity", ALARMS)
def test_an_alarm_fires_on_a_collapse_and_names_level_value_and_flag(quantity):
    for series in COLLAPSED[quantity]:
        name = f"executor/{quantity}"
        found = alarms({name: series, "planner/loss": series})
        assert list(found) == [name]
        assert found[name].startswith(f"executor {quantity} ") and "--" in found[name]
        assert found[name].endswith(ALARMS[quantity].advice)


@pytest.mark.parametrize("quantity", ALARMS)
@pytest.mark.parametrize("level", LEVELS)
def test_no_alarm_fires_on_a_healthy_run_at_any_look(quantity, level):
    for series in HEALTHY[quantity]:
        for steps in range(1, len(series) + 1):
            assert alarms({f"{level}/{quantity}": series[:steps]}) == {}


@pytest.mark.parametrize("quantity", ALARMS)
def test_pure_noise_around_a_healthy_value_is_no_trend(quantity):
    centre = {"ess_share": 0.7, "q_loss": 0.3, "mc_rank_corr": 0.1, "logp_expert": -1.5}.get(quantity, 0.0)
    for seed in range(30):
        watch = Watch()
        for value in noisy(lambda t: centre, noise=0.15 if centre in (0.7, 0.3) else 0.9, seed=seed):
            assert watch({f"planner/{quantity}": value}) == []


@pytest.mark.parametrize("quantity", ALARMS)
def test_a_series_that_is_too_short_to_tell_is_silent(quantity):
    least = ALARMS[quantity].least
    assert least >= 5
    worst = COLLAPSED[quantity][0]
    assert alarms({f"planner/{quantity}": (worst * 2)[-least + 1 :]}) == {}
    assert alarms({f"planner/{quantity}": []}) == {}


def test_an_alarm_ends_when_the_quantity_recovers():
    assert "planner/ess_share" in alarms({"planner/ess_share": [0.9] * 20 + [0.01] * 20})
    assert alarms({"planner/ess_share": [0.9] * 20 + [0.01] * 20 + [0.9] * 20}) == {}
    assert "planner/mc_rank_corr" in alarms({"planner/mc_rank_corr": [-0.5] * 110})
    assert alarms({"planner/mc_rank_corr": [-0.5] * 110 + [0.4] * 12}) == {}


def test_watch_returns_each_alarm_once_by_level():
    watch, told = Watch(every=20), []
    for step in range(1, 81):
        late = step > 40
        metrics = {"planner/ess_share": 0.01, "executor/ess_share": 0.01 if late else 0.9, "actor/lr": 1.0}
        told += [(step, " ".join(text.split()[:2])) for text in watch(metrics)]
    assert told == [(20, "planner ess_share"), (60, "executor ess_share")]


# --- alarms of an evaluation ------------------------------------------------------------------------------
def subtasks(**changes) -> dict:
    ended_by = {"claim": 30, "judge": 0, "cap": 6, "limit": 3, "world": 1}
    return {"ends": "claim", "count": 40, "ended_by": ended_by, "precision": 0.8} | changes


CAPPED = {"claim": 10, "judge": 0, "cap": 26, "limit": 3, "world": 1}


@pytest.mark.parametrize(
    "unparsed, summary, expected",
    [
        (0.0, subtasks(), []),
        (0.2, subtasks(precision=0.5), []),
        (0.25, subtasks(), ["25% of the executor's answers"]),
        (0.0, subtasks(ended_by=CAPPED), ["65% of the subtasks end at the cap"]),
        (0.0, subtasks(ended_by=CAPPED, ends="cap"), []),  # asked for
        (0.0, subtasks(precision=0.4), ["confirms only 40% of the claims"]),
        (0.0, subtasks(precision=0.0, ends="episode"), []),  # a flat agent's claims mean nothing
        (0.0, subtasks(precision=None), []),  # no claim
        (0.0, subtasks(count=0), []),  # no subtask
        (0.0, None, []),  # a result from before they were counted
        (0.3, subtasks(ended_by=CAPPED, precision=0.1), ["30%", "65%", "10%"]),
    ],
)
def test_alarms_of_an_evaluation(unparsed, summary, expected):
    result = {"parse_failure_rate": unparsed} | ({"subtasks": summary} if summary else {})
    found = result_alarms(result)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
