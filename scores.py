"""From episodes to numbers with intervals: macro score, stratified bootstrap, Wilson, paired difference.

The score of an episode is max(0, final score) in 0..100; the macro mean averages the means of the task types,
so that a type with many variations counts no more than one with few. What this file does not do: choose
anything.
"""

import math
from collections import defaultdict

import numpy as np

Z95 = 1.959964  # standard normal quantile of 97.5 %


def by_type(tasks: list[str], values: list[float]) -> dict[str, np.ndarray]:
    groups = defaultdict(list)
    for task, value in zip(tasks, values, strict=True):
        groups[task].append(value)
    return {task: np.array(v, dtype=float) for task, v in sorted(groups.items())}


def macro_mean(tasks: list[str], values: list[float]) -> float:
    """Mean over types of the mean over episodes of the type."""
    return float(np.mean([v.mean() for v in by_type(tasks, values).values()]))


def bootstrap_ci(
    tasks: list[str], values: list[list[float]], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the macro mean: a bootstrap that draws seeds, then episodes within each type.

    values[s][e]: seed s, episode e (same episodes for every seed). With one seed only episodes are drawn.
    For A against B give the differences A - B per episode: that is the paired interval.
    """
    rng, matrix = np.random.default_rng(seed), np.array(values, dtype=float)  # (S, E)
    types = [np.array([i for i, t in enumerate(tasks) if t == task]) for task in sorted(set(tasks))]
    means = []
    for _ in range(draws):
        seeds = rng.integers(len(matrix), size=len(matrix))
        per_type = []
        for index in types:
            chosen = rng.choice(index, size=(len(seeds), len(index)))
            per_type.append(matrix[seeds[:, None], chosen].mean())
        means.append(np.mean(per_type))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a success rate within one seed (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z = successes / n, Z95
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def summary(tasks: list[str], scores: list[float], successes: list[bool]) -> dict:
    """The numbers of one evaluation with one seed. scores: raw final scores in points, negative ones as 0."""
    clipped = [max(0.0, score) for score in scores]
    groups, wins = by_type(tasks, clipped), by_type(tasks, [float(s) for s in successes])
    return {
        "episodes": len(tasks),
        "macro_mean": round(macro_mean(tasks, clipped), 2),
        "ci95": [round(x, 2) for x in bootstrap_ci(tasks, [clipped])],
        "success_rate": round(sum(successes) / len(successes), 4),
        "success_ci95": [round(x, 4) for x in wilson(sum(successes), len(successes))],
        "per_type": {
            task: {
                "mean": round(float(v.mean()), 2),
                "episodes": len(v),
                "success": round(float(wins[task].mean()), 4),
                "success_ci95": [round(x, 4) for x in wilson(int(wins[task].sum()), len(v))],
            }
            for task, v in groups.items()
        },
    }
