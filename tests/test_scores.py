"""scores.py by hand, against every possible resample, and against what is published."""

import itertools

import numpy as np
import pytest

from scores import bootstrap_ci, by_type, macro_mean, summary, wilson


def test_the_macro_mean_counts_every_type_once():
    tasks = ["boil", "melt", "boil", "boil"]
    assert macro_mean(tasks, [10, 100, 20, 30]) == 60  # (20 + 100) / 2, not the mean 40 of the episodes


def test_types_are_sorted_and_keep_their_episodes_in_order():
    groups = by_type(["b", "a", "b"], [1, 2, 3])
    assert {task: list(values) for task, values in groups.items()} == {"b": [1, 3], "a": [2]}
    assert list(groups) == ["a", "b"]


def test_tasks_and_values_of_other_lengths_are_refused():
    with pytest.raises(ValueError):
        macro_mean(["a", "b"], [1.0])


# --- bootstrap ----------------------------------------------------------------------------------------------
def every_resample(tasks, values):
    """Macro means of all equally likely stratified resamples of one seed."""
    groups = [
        [np.mean(draw) for draw in itertools.product(group, repeat=len(group))]
        for group in by_type(tasks, values).values()
    ]
    return [np.mean(means) for means in itertools.product(*groups)]


def test_the_interval_is_that_of_all_possible_resamples():
    tasks, values = ["a"] * 4 + ["b"] * 3, [0.0, 13.0, 57.0, 100.0, 20.0, 41.0, 93.0]
    exact = np.percentile(every_resample(tasks, values), [2.5, 97.5])  # 4^4 * 3^3 = 6912 of them
    assert bootstrap_ci(tasks, [values], draws=8000) == pytest.approx(tuple(exact), abs=1.0)


def test_equal_scores_have_an_interval_of_width_zero():
    assert bootstrap_ci(["a", "a", "b"], [[30.0, 30.0, 30.0]]) == (30, 30)


def test_one_episode_per_type_has_an_interval_of_width_zero():
    """Types are strata: they are never drawn themselves, so 0 and 100 leave nothing to chance."""
    assert bootstrap_ci(["a", "b"], [[0.0, 100.0]]) == (50, 50)


def test_types_are_drawn_separately():
    """Within a type nothing varies, between types all does: only drawing over all episodes has a width."""
    tasks = ["a"] * 5 + ["b"] * 5
    assert bootstrap_ci(tasks, [[0.0] * 5 + [100.0] * 5]) == (50, 50)


def test_the_difference_of_equal_lists_is_exactly_zero():
    scores = np.array([[3.0, 80.0, 41.0, 7.0]])
    assert bootstrap_ci(["a", "a", "b", "b"], scores - scores) == (0, 0)


def test_pairing_by_episode_is_narrower_than_two_intervals():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(50, 20, size=30)
    better, worse = difficulty + 5 + rng.normal(size=30), difficulty
    low, high = bootstrap_ci(["a"] * 30, [better - worse])
    assert 4 < low < high < 6
    low_better, high_worse = bootstrap_ci(["a"] * 30, [better])[0], bootstrap_ci(["a"] * 30, [worse])[1]
    assert low_better < high_worse  # unpaired, the two cannot be told apart


def test_the_order_of_the_episodes_changes_only_the_noise():
    tasks, values = ["a"] * 6 + ["b"] * 6, [float(v) for v in range(0, 96, 8)]
    there = bootstrap_ci(tasks, [values], draws=4000)
    back = bootstrap_ci(tasks[::-1], [values[::-1]], draws=4000)
    assert there == pytest.approx(back, abs=1.5)


def test_the_same_seed_gives_the_same_interval():
    tasks, values = ["a"] * 5, [[1.0, 5.0, 9.0, 40.0, 77.0]]
    assert bootstrap_ci(tasks, values) == bootstrap_ci(tasks, values)
    assert bootstrap_ci(tasks, values) != bootstrap_ci(tasks, values, seed=1)


def test_seeds_are_drawn_first():
    """A quarter of the draws takes one of the two seeds twice, so the ends are the two seeds."""
    assert bootstrap_ci(["a"] * 4, [[10.0] * 4, [90.0] * 4]) == (10, 90)


def test_equal_seeds_narrow_the_interval_as_more_episodes_would():
    tasks, values = ["a"] * 8, [float(v) for v in range(0, 96, 12)]
    one = np.ptp(bootstrap_ci(tasks, [values], draws=4000))
    four = np.ptp(bootstrap_ci(tasks, [values] * 4, draws=4000))
    assert four == pytest.approx(one / 2, rel=0.1)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Two types of 40 normal scores; the percentile bootstrap is known to cover slightly less than 95 %."""
    rng, tasks, covered = np.random.default_rng(0), ["a"] * 40 + ["b"] * 40, 0
    for trial in range(200):
        scores = np.concatenate([rng.normal(30, 10, 40), rng.normal(70, 20, 40)])
        low, high = bootstrap_ci(tasks, [scores], draws=400, seed=trial)
        covered += low <= 50 <= high
    assert 0.90 <= covered / 200 <= 0.985


# --- Wilson -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 40, 0.0, 0.0876),
        (40, 40, 0.9124, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, without continuity correction
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_knows_nothing_without_episodes():
    assert wilson(0, 0) == (0, 1)


# --- summary ------------------------------------------------------------------------------------------------
def test_a_negative_score_counts_as_zero():
    """A fatal mistake is raw -100; max(0, .) is taken per episode, before any mean."""
    result = summary(["a", "a", "b"], [-100.0, 60.0, 10.0], [False, False, False])
    assert result["macro_mean"] == 20  # (30 + 10) / 2
    a = {"mean": 30, "episodes": 2, "success": 0, "success_ci95": [0, 0.6576]}
    assert result["per_type"]["a"] == a
    assert result["ci95"][0] >= 0


def test_success_is_counted_over_episodes_and_with_wilson():
    result = summary(["a"] * 9 + ["b"], [100.0] * 8 + [0.0] * 2, [True] * 8 + [False] * 2)
    assert result["episodes"] == 10
    assert result["success_rate"] == 0.8
    assert result["success_ci95"] == [0.4902, 0.9433]
    assert result["per_type"]["a"]["success"] == pytest.approx(8 / 9, abs=1e-4)
    assert result["per_type"]["b"]["success"] == 0
