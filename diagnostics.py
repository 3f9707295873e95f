"""Diagnostics of offline RL: each level's numbers, and alarms in plain words when they collapse.

A critic is held against the Monte-Carlo returns of the data, the weights against their effective sample size
(Kish), the policy against the one that sampled the rollouts. docs/metrics.md has every equation and healthy
range. What this file does not do: change anything that is learned.
"""

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
    if sampled.any():  # E_{u ~ SFT}[log pi_SFT(u) - log pi(u)] = KL(pi_SFT || pi), per answer
        quantities["kl_sft"] = (d.behavior_logp - logp)[sampled].mean()
    known = d.mc_return.isfinite()
    if known.any():
        quantities["mc_bias"] = (d.q - d.mc_return)[known].mean()
    if known.sum() >= 3 and not (rho := rank_correlation(d.q[known], d.mc_return[known])).isnan():
        quantities["mc_rank_corr"] = rho
    return quantities


# --- alarms -----------------------------------------------------------------------------------------------
def _late(series: list[float], share: float = 0.1) -> float:
    """Mean of the last tenth, at least of five."""
    tail = series[-max(5, int(len(series) * share)) :]
    return sum(tail) / len(tail)


# quantity -> (has it collapsed? of its series, what that means and what to do)
ALARMS = {
    "ess_share": (
        lambda x: _late(x) < 0.1,
        "under a tenth of the decisions carries the step: raise --rl.temperature, look at the critics",
    ),
    "weight_max": (
        lambda x: _late(x) > 1e3,
        "single weights are above 1,000: lower --rl.max-weight",
    ),
    "value_mean": (
        lambda x: abs(_late(x)) > 5,
        "V is far outside of the returns (-2 to 1): the bootstrap diverges; lower --rl.critic-lr",
    ),
    "q_loss": (
        lambda x: len(x) >= 20 and _late(x) > 3 * max(_late(x[: len(x) // 2]), 1e-3),
        "the TD error of Q grows: the bootstrap diverges; lower --rl.critic-lr or --rl.polyak",
    ),
    "mc_rank_corr": (
        lambda x: len(x) >= 20 and _late(x) < -0.2,
        "Q orders the decisions against their Monte-Carlo returns: the weights favour the worse ones",
    ),
    "logp_expert": (
        lambda x: len(x) >= 10 and _late(x) < _late(x[:5]) - 0.5,
        "the policy forgets the experts (log-prob per token fell by over 0.5): lower --rl.actor-lr",
    ),
    "kl_sft": (
        lambda x: _late(x) > 10,
        "the policy is over 10 nats per answer from the one that played the rollouts: lower --rl.actor-lr",
    ),
    "parse_failure_rate": (
        lambda x: _late(x) > 0.2,
        "one answer in five is not '<action>; True|False': too little SFT, or answers are cut",
    ),
}


def alarms(metrics: dict[str, list[float]]) -> list[str]:
    """{"level/quantity": values in order of steps, at least five} -> what has collapsed, in plain words."""
    found = []
    for name, series in metrics.items():
        level, _, quantity = name.rpartition("/")
        if quantity in ALARMS and len(series) >= 5 and ALARMS[quantity][0](series):
            found.append(f"{level} {quantity} {_late(series):.3g}: {ALARMS[quantity][1]}")
    return found


class Watch:
    """Collects the metrics of a run and returns each alarm once."""

    def __init__(self, every: int = 20):
        self.every, self.series, self.steps, self.seen = every, {}, 0, set()

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The alarms that are new after this step; looked for every `every` steps."""
        for name, value in metrics.items():
            self.series.setdefault(name, []).append(value)
        self.steps += 1
        found = [] if self.steps % self.every else alarms(self.series)
        new = {" ".join(alarm.split()[:2]): alarm for alarm in found}  # by level and quantity
        fresh = [alarm for name, alarm in new.items() if name not in self.seen]
        self.seen |= set(new)
        return fresh
