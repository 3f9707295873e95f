"""Diagnostics of RL: each level's numbers, and alarms in plain words when they collapse.

A critic is held against the Monte-Carlo returns of the data, the weights against their effective sample size
(Kish), the policy against the one that sampled the rollouts. docs/train_orl.md has every equation and healthy
range. What this file does not do: change anything that is learned.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from critic import effective_sample_size

QUANTILES = (5, 25, 50, 75, 95)  # percent, of advantages and weights: a histogram in five numbers


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rho: Pearson correlation of the ranks, ties at their mean rank. (B,), (B,) -> in [-1, 1].

    nan when either is constant.
    """

    def ranks(values: Tensor) -> Tensor:
        below = (values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)
        return below.float() - below.float().mean()

    a, b = ranks(x), ranks(y)
    return (a * b).sum() / (a.norm() * b.norm())


def level_quantities(d, token_norm: str) -> dict[str, Tensor]:
    """`quantity` -> scalar of the decisions of one level; d: learner.Decisions, every field (B,).

    A quantity is left out where nothing defines it (no expert in the batch, no known return).
    """
    logp = d.logp if token_norm == "sum" else d.logp * d.tokens  # (B,) of whole answers
    quantities = {
        "value_mean": d.v.mean(),
        "q_mean": d.q.mean(),
        "advantage_mean": d.advantage.mean(),
        "weight_mean": d.weight.mean(),
        "weight_max": d.weight.max(),
        "ess_share": effective_sample_size(d.weight) / len(d.weight),
        "logp_mean": logp.sum() / d.tokens.sum(),  # per token
    }
    at = torch.tensor(QUANTILES, device=d.v.device) / 100
    for name in ("advantage", "weight"):
        values = getattr(d, name).float().quantile(at)
        quantities |= {f"{name}_p{p:02d}": value for p, value in zip(QUANTILES, values, strict=True)}
    for name, rows in {"expert": d.expert, "rollout": ~d.expert}.items():
        if rows.any():
            quantities[f"logp_{name}"] = logp[rows].sum() / d.tokens[rows].sum()
    sampled = d.behavior_logp.isfinite()
    if sampled.any():  # E_u[log pi_SFT(u) - log pi(u)]: KL(pi_SFT || pi) if u came at temperature 1
        quantities["kl_sft"] = (d.behavior_logp - logp)[sampled].mean()
    known = d.mc_return.isfinite()
    if known.any():
        quantities["mc_bias"] = (d.q - d.mc_return)[known].mean()
    if known.sum() >= 3 and not (rho := rank_correlation(d.q[known], d.mc_return[known])).isnan():
        quantities["mc_rank_corr"] = rho
    return quantities


# --- alarms -----------------------------------------------------------------------------------------------
def _late(x: Tensor) -> Tensor:
    """Mean of the last tenth, at least of five. x (S,): the values that were logged, in order."""
    return x[-max(5, len(x) // 10) :].mean()


def _rise(x: Tensor) -> Tensor:
    """How far the last tenth lies above the first, beyond chance: less three standard errors. (S,) -> scalar.

    A batch holds few decisions of a level, so a number that is only noisy must not look like a trend.
    """
    size = max(5, len(x) // 10)
    first, last = x[:size], x[-size:]
    return last.mean() - first.mean() - 3 * ((first.var() + last.var()) / size).sqrt()


def _grows(x: Tensor) -> bool:
    """The last quarter is over three times the second; medians, since a rare reward makes a large error."""
    quarter = len(x) // 4
    return x[-quarter:].median() > 3 * x[quarter : 2 * quarter].median().clamp_min(0.05)


def _below_zero(x: Tensor) -> bool:
    """The later half is under -0.2 and three standard errors below 0, the last tenth under -0.2 too."""
    half = x[len(x) // 2 :]
    return half.mean() < min(-0.2, -3 * half.std() / len(half) ** 0.5) and _late(x) < -0.2


class Alarm(NamedTuple):
    """When a quantity of a level has collapsed, and what to do."""

    least: int  # values that it takes to tell
    collapsed: Callable[[Tensor], bool]  # of the values that were logged, in order (S,)
    advice: str


ALARMS = {
    "ess_share": Alarm(
        5,
        lambda x: _late(x) < 0.1,
        "under a tenth of the decisions carries the step: raise --rl.temperature or lower --rl.max-weight; "
        "with another --rl.actor than awr look at Q",
    ),
    "weight_max": Alarm(
        5,
        lambda x: _late(x) > 1e3,
        "single weights are above 1,000: lower --rl.max-weight (the papers' code: 20)",
    ),
    "value_mean": Alarm(
        5,
        lambda x: _late(x) > 2 or _late(x) < -10,
        "V is far outside of the returns (at most 1): the bootstrap diverges; lower --rl.critic-lr or "
        "--rl.polyak",
    ),
    "q_loss": Alarm(
        40,
        _grows,
        "the TD error of Q grows: the bootstrap diverges; lower --rl.critic-lr or --rl.polyak",
    ),
    "mc_rank_corr": Alarm(
        60,
        _below_zero,
        "Q orders the decisions against their Monte-Carlo returns, so the weights favour the worse ones: "
        "train the critics longer (--warmup-steps) or faster (--rl.critic-lr)",
    ),
    "logp_expert": Alarm(
        20,
        lambda x: _rise(-x) > 0.2,
        "the policy forgets the experts (log-prob per token fell by over 0.2): lower --rl.actor-lr, or raise "
        "--expert-share; with --rl.actor signed_advantage this is how it ends",
    ),
    "kl_sft": Alarm(
        20,
        lambda x: _rise(x) > 1,
        "the policy has moved over 1 nat per answer from the one that played the rollouts: lower "
        "--rl.actor-lr; with --rl.actor signed_advantage this is how it ends",
    ),
}
PLAY_ALARMS = {  # of a plan-execute agent at play (train_hiper.py)
    "switch_rate": Alarm(
        5,
        lambda x: _late(x) < 0.01 or _late(x) > 0.95,
        "it always keeps, or always switches its subgoal: no hierarchy is left; raise --rl.kl, lower --rl.lr",
    ),
    "format_rate": Alarm(
        5, lambda x: _late(x) < 0.8, "the format is being lost: raise --rl.format-penalty or --rl.kl"
    ),
    "answer_tokens": Alarm(
        10,
        lambda x: _late(x) > 2 * x[:5].mean(),
        "answers have doubled in length: raise --rl.kl or --rl.format-penalty",
    ),
}


def alarms(metrics: dict[str, list[float]]) -> dict[str, str]:
    """{"level/quantity": values in order of steps} -> {"level/quantity": what has collapsed, in plain words}.

    A series that is too short to tell is silent.
    """
    found = {}
    for name, series in metrics.items():
        level, _, quantity = name.rpartition("/")
        alarm, x = (ALARMS | PLAY_ALARMS).get(quantity), torch.tensor(series, dtype=torch.float64)
        if alarm and len(x) >= alarm.least and alarm.collapsed(x):
            found[name] = f"{level} {quantity} {_late(x):.3g}: {alarm.advice}"
    return found


class Watch:
    """Collects the metrics of a run and returns each alarm once, by level."""

    def __init__(self, every: int = 20):
        self.every, self.series, self.steps, self.seen = every, {}, 0, set()

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The alarms that are new after this step; looked for every `every` steps."""
        for name, value in metrics.items():
            self.series.setdefault(name, []).append(value)
        self.steps += 1
        found = {} if self.steps % self.every else alarms(self.series)
        new = [text for name, text in found.items() if name not in self.seen]
        self.seen |= set(found)
        return new


def result_alarms(result: dict) -> list[str]:
    """What went wrong while an agent played, in plain words; result: one of eval.py."""
    found, unparsed, subtasks = [], result["parse_failure_rate"], result.get("subtasks") or {"count": 0}
    if unparsed > 0.2:
        found.append(
            f"{unparsed:.0%} of the executor's answers are not '<action>; True|False': "
            "too little SFT, or they are cut"
        )
    if not subtasks["count"]:  # an agent without subtasks, or a result from before they were counted
        return found
    capped, precision = subtasks["ended_by"]["cap"] / subtasks["count"], subtasks["precision"]
    if capped > 0.5 and subtasks["ends"] != "cap":
        found.append(
            f"{capped:.0%} of the subtasks end at the cap on actions: "
            "the executor is stuck, or never says that it is done"
        )
    if (
        precision is not None and precision < 0.5 and subtasks["ends"] != "episode"
    ):  # flat: claims end nothing
        found.append(f"the judge confirms only {precision:.0%} of the claims: the executor claims too early")
    return found
