"""Q and V heads with a target copy, and the losses of offline RL: values in, targets and weights out.

GLIDER (arXiv:2505.19761) eqs. 4, 5, 7, read as IQL (arXiv:2110.06169): V regresses to an upper expectile of Q
over the actions of the dataset, Q to reward + discount * V(s'), and the policy imitates actions weighted by
exp(advantage / temperature). Beside them HiPER's advantages along an episode. What this file does not do:
touch the language model, or take a step. Shapes: B decisions, D hidden size, T turns of one episode.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


# --- targets, losses, weights -----------------------------------------------------------------------------
def bootstrap_discount(gamma: float, steps: Tensor, mode: Literal["subtask", "smdp"]) -> Tensor:
    """What multiplies V(s'): gamma per decision (published), or gamma^k for an option of k steps. (B,).

    "subtask" is GLIDER eq. 4: a subtask of any length costs the planner one gamma. "smdp" is the discount of
    options (Sutton, Precup & Singh 1999). steps: environment steps that the decision spanned.
    """
    if mode == "subtask":
        return torch.full_like(steps, gamma, dtype=torch.float32)
    if mode == "smdp":
        return gamma ** steps.float()
    raise ValueError(f"discount mode is {mode!r}, expected 'subtask' or 'smdp'")


def td_target(reward: Tensor, discount: Tensor, terminated: Tensor, next_value: Tensor) -> Tensor:
    """y = reward + discount * (1 - terminated) * V_target(s')  (GLIDER eq. 4). All (B,); held constant.

    Truncation is not termination: a decision that a step limit cut off bootstraps. `where`, not a product, so
    that whatever stands in for s' once the world has ended is not read, even nan.
    """
    return reward + torch.where(terminated, 0.0, discount * next_value).detach()


def td_loss(q: Tensor, target: Tensor, count: int | None = None) -> Tensor:
    """L_Q = E[(y - Q(s,a))^2], y held constant  (GLIDER eq. 4). (B,) -> scalar: sum / count, by default B."""
    return (target.detach() - q).pow(2).sum() / (len(q) if count is None else count)


def expectile_loss(diff: Tensor, expectile: float, count: int | None = None) -> Tensor:
    """L_V = E[|expectile - 1(u<0)| u^2], u = Q_target(s,a) - V(s)  (IQL eq. 5; GLIDER eq. 5 with dataset a).

    diff = u (B,) -> scalar: sum / count, by default B. Q_target is held constant. An expectile of 0.5 is half
    the squared error; above 0.5, V ends up above the mean of Q.
    """
    weight = torch.where(diff < 0, 1 - expectile, expectile)
    return (weight * diff.pow(2)).sum() / (len(diff) if count is None else count)


def conservative_loss(policy_q: Tensor, data_q: Tensor, count: int | None = None) -> Tensor:
    """E_{u~pi}[Q(s,u)] - E_D[Q(s,a)]  (CQL, arXiv:2006.04779, eq. 2 with mu = pi); added to L_Q.

    Both (B,) -> scalar: sum / count, by default B. Both carry a gradient: Q falls where the policy strays
    from the data.
    """
    return (policy_q - data_q).sum() / (len(data_q) if count is None else count)


def awr_weight(advantage: Tensor, temperature: float, max_weight: float) -> Tensor:
    """w = exp(min(A / temperature, log max_weight)), A = Q(s,a) - V(s)  (GLIDER eq. 7).

    (B,) -> (B,), held constant. The exponent is clamped, so that with a finite ceiling nothing overflows.
    temperature = inf gives 1 everywhere: behaviour cloning.
    """
    return (advantage.detach() / temperature).clamp(max=math.log(max_weight)).exp()


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum |w|)^2 / sum w^2  (Kish): as many decisions of equal weight would say as much. (B,) -> in [1, B].

    0 when all weights are 0.
    """
    return weights.abs().sum().pow(2) / weights.pow(2).sum().clamp_min(1e-30)


# --- advantages along an episode ----------------------------------------------------------------------------
def gae(reward: Tensor, value: Tensor, next_value: Tensor, decay: Tensor, discount: Tensor) -> Tensor:
    """A_t = d_t + decay_t * A_{t+1},  d_t = r_t + discount_t * V(s_{t+1}) - V(s_t)  (GAE, arXiv:1506.02438).

    All (T,), one episode in order. With decay = gamma * lambda and discount = gamma it is plain GAE; a decay
    of 0 at t cuts the sum behind t. next_value is 0 where the world ended, V of the next observation where a
    step limit cut the episode off.
    """
    delta, advantage = reward + discount * next_value - value, torch.zeros(len(reward) + 1)
    for t in reversed(range(len(reward))):
        advantage[t] = delta[t] + decay[t] * advantage[t + 1]
    return advantage[:-1]


def hierarchical_gae(
    reward: Tensor,
    switch: Tensor,
    v_low: Tensor,
    v_high: Tensor,
    gamma: float,
    lam: float,
    lam_segment: float,
    final_low: float = 0.0,
    final_high: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Hierarchical advantage estimation: (A_low, A_high)  (HiPER, arXiv:2602.16165, sec. 4).

    Low: GAE(lambda) inside a segment; its last turn bootstraps from V_high of the next one, and the sum is
    cut there. High: a segment is one step of reward R_k = sum_i gamma^i r and discount gamma^length, GAE with
    lam_segment over segments.

    reward, v_low = V(s_t, subgoal), v_high = V(s_t): (T,). switch: (T,) bool, true where a new subgoal was
    chosen; the first turn always counts. final_low, final_high: values of the observation after the last turn
    where a limit cut the episode off; 0 where the world ended. -> (T,) and (T,), A_high nan between switches.
    """
    starts = torch.cat([torch.ones(1, dtype=torch.bool), switch[1:].bool()])
    last = torch.cat([starts[1:], torch.ones(1, dtype=torch.bool)])  # last turn of its segment
    then_low = torch.cat([v_low[1:], torch.tensor([final_low])])
    then_high = torch.cat([v_high[1:], torch.tensor([final_high])])
    next_low = torch.where(last, then_high, then_low)
    next_low[-1] = final_low
    decay = torch.where(last, 0.0, torch.full_like(reward, gamma * lam))
    low = gae(reward, v_low, next_low, decay, torch.full_like(reward, gamma))

    begin = starts.nonzero()[:, 0]
    length = torch.diff(begin, append=torch.tensor([len(reward)]))
    inside = torch.arange(len(reward)) - begin.repeat_interleave(length)  # turns since the segment began
    segment = torch.arange(len(begin)).repeat_interleave(length)
    segment_reward = torch.zeros(len(begin)).index_add(0, segment, gamma**inside * reward)
    discount = gamma**length
    high = torch.full_like(reward, torch.nan)
    high[begin] = gae(segment_reward, v_high[begin], then_high[last], discount * lam_segment, discount)
    return low, high


def switch_advantage(switch: Tensor, probability: Tensor, v_high: Tensor, v_keep: Tensor) -> Tensor:
    """A = (q - beta) (V_high(s) - V_low(s, old subgoal)), beta = pi(SWITCH)  (HiPER sec. 4). All (T,).

    The exact advantage of a choice between two actions: to switch is worth V_high(s), to keep v_keep.
    """
    return (switch.float() - probability) * (v_high - v_keep)


def switch_advantage_released(
    reward: Tensor, switch: Tensor, v_high: Tensor, v_term: Tensor, gamma: float, final_high: float = 0.0
) -> Tensor:
    """A = G_t - V_term(s_t), G_t the return to its segment's end and V_high there (HiPER's code). (T,)."""
    last = torch.cat([switch[1:].bool(), torch.ones(1, dtype=torch.bool)])
    value = torch.cat([v_high[1:], torch.tensor([final_high])])
    decay = torch.where(last, 0.0, torch.full_like(reward, gamma))
    return (
        gae(reward, torch.zeros_like(reward), torch.where(last, value, 0.0), decay, decay + gamma * last)
        - v_term
    )


# --- heads ------------------------------------------------------------------------------------------------
class Heads(nn.Module):
    """Independent Q and V heads per level: MLPs D -> D -> D -> 1 with ReLU (GLIDER's shape), in float32."""

    def __init__(self, hidden_size: int, levels: Sequence[str]):
        super().__init__()
        self.q = nn.ModuleDict({level: _mlp(hidden_size) for level in levels})
        self.v = nn.ModuleDict({level: _mlp(hidden_size) for level in levels})


def _mlp(hidden_size: int) -> nn.Sequential:
    D = hidden_size
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1)).float()


class Values(nn.Module):
    """HiPER's values as heads on hidden states: V_high(s), V_low(s, subgoal), V_term(s, old subgoal)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: _mlp(hidden_size) for name in ("high", "low", "term")})

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden (B, 2, D), after the prompt and before the action -> name: (B,)."""
        column = {"high": 0, "low": 1, "term": 0}
        return {name: head(hidden[:, column[name]]).squeeze(-1) for name, head in self.heads.items()}


def _by_level(heads: nn.ModuleDict, hidden: Tensor, level_index: Tensor) -> Tensor:
    """Row b through the head of its level: hidden (B, D), level_index (B,) into the names, in order -> (B,).

    A level that is absent is not called, so its head gets no gradient at all (and no weight decay).
    """
    values = torch.full_like(
        hidden[:, 0], torch.nan, dtype=torch.float32
    )  # an index without a head must show
    for index, head in enumerate(heads.values()):
        (rows,) = (level_index == index).nonzero(as_tuple=True)
        if len(rows):
            values = values.index_copy(0, rows, head(hidden[rows].float()).squeeze(-1))
    return values


class Critics(nn.Module):
    """Q and V for every level, and a frozen target copy of all of them that follows by Polyak averaging.

    Q(s,a) reads the hidden state of the answer's last token (its EOS), V(s) that of the prompt's last token.
    One call serves a batch of mixed levels: hidden (B, D), level_index (B,) into `levels` -> (B,).
    """

    def __init__(self, hidden_size: int, levels: Sequence[str] = ("planner", "executor", "progress")):
        super().__init__()
        self.hidden_size, self.levels = hidden_size, tuple(levels)
        self.online = Heads(hidden_size, levels)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def q(self, hidden: Tensor, level_index: Tensor) -> Tensor:
        """Q(s,a)  (GLIDER eq. 4). hidden (B, D) at the answer's last token, level_index (B,) -> (B,)."""
        return _by_level(self.online.q, hidden, level_index)

    def v(self, hidden: Tensor, level_index: Tensor) -> Tensor:
        """V(s)  (GLIDER eq. 5). hidden (B, D) at the prompt's last token, level_index (B,) -> (B,)."""
        return _by_level(self.online.v, hidden, level_index)

    @torch.no_grad()
    def target_q(self, hidden: Tensor, level_index: Tensor) -> Tensor:
        """Q(s,a) by the target heads, held constant: (B, D), (B,) -> (B,)."""
        return _by_level(self.target.q, hidden, level_index)

    @torch.no_grad()
    def target_v(self, hidden: Tensor, level_index: Tensor) -> Tensor:
        """V(s) by the target heads, held constant: (B, D), (B,) -> (B,)."""
        return _by_level(self.target.v, hidden, level_index)

    @torch.no_grad()
    def update_target(self, polyak: float) -> None:
        """target <- (1 - polyak) * target + polyak * online, every parameter  (GLIDER Algorithm 1)."""
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, polyak)


# --- files ------------------------------------------------------------------------------------------------
def save_critics(critics: Critics, path: str | Path) -> None:
    """Writes online and target heads to one safetensors file; sizes and level names go into its header."""
    metadata = {"hidden_size": str(critics.hidden_size), "levels": ",".join(critics.levels)}
    save_file(critics.state_dict(), path, metadata=metadata)


def load_critics(path: str | Path, hidden_size: int | None = None) -> Critics:
    """The Critics of save_critics, on the CPU. Give the backbone's hidden_size to have it checked."""
    if not Path(path).is_file():
        raise ValueError(f"no critic at {path}: train_orl.py writes it beside the adapter")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if not {"hidden_size", "levels"} <= set(metadata):
        raise ValueError(
            f"{path} is not a critic file (no hidden_size in its header): give critic.safetensors"
        )
    found = int(metadata["hidden_size"])
    if hidden_size is not None and found != hidden_size:
        fix = "load it with the backbone it was trained on, or start a new critic"
        raise ValueError(f"{path} has hidden size {found}, expected {hidden_size}: {fix}")
    critics = Critics(found, metadata["levels"].split(","))
    critics.load_state_dict(load_file(path))
    return critics
