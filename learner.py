"""One gradient step of offline RL: V, Q, policy, target (GLIDER, arXiv:2505.19761, Algorithm 1).

Eq. 5 draws actions from the policy; here, as in IQL (arXiv:2110.06169), those of the dataset. The same step
serves offline data, fresh episodes and, with actor="bc", behaviour cloning. What this file does not do:
choose the data, act, or switch dropout off (the policy comes without it).
Shapes: B decisions, T tokens, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from batches import Batch
from critic import (
    Critics,
    awr_weight,
    bootstrap_discount,
    effective_sample_size,
    expectile_loss,
    td_loss,
    td_target,
)
from data import LEVELS
from logprob import head_weight, sequence_logprobs

HiddenFn = Callable[
    [nn.Module, Tensor, Tensor], Tensor
]  # (policy, input_ids (B, T), level (B,)) -> (B, T, D)


@dataclass(frozen=True)
class RLConfig:
    """What the step depends on. GLIDER's two taus are `expectile` and `polyak`, its lambda `temperature`."""

    gamma: float = 0.99  # discount per decision, or per environment step with "smdp" (GLIDER Table 5)
    discount: Literal["subtask", "smdp"] = "subtask"  # published: one gamma per subtask; option: gamma^steps
    expectile: float = 0.7  # IQL's tau, in (0, 1); 0.5 is plain regression (GLIDER gives no value, IQL 0.7)
    polyak: float = 0.2  # share of the online heads that enters the target each step (GLIDER Table 5)
    actor: Literal["awr", "bc"] = "awr"  # eq. 7, or the same step with weight 1: behaviour cloning
    temperature: float = 0.99  # unit of advantage; it divides, so inf is behaviour cloning (GLIDER Table 5)
    max_weight: float = 20.0  # ceiling of one decision's weight (STEP-HRL's code; GLIDER names none)
    token_norm: Literal["sum", "mean"] = "sum"  # log pi of a whole answer (eq. 7), or its mean per token
    actor_lr: float = 1e-4  # AdamW step size of the policy (GLIDER: 1e-5 for 7B to 8B backbones)
    critic_lr: float = 1e-4  # AdamW step size of the heads (GLIDER Table 5)
    clip_norm: float = 1.0  # ceiling of the gradient norm, policy and heads apart (GLIDER's code: together)

    def __post_init__(self):
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile is {self.expectile}, expected in (0, 1): 0.5 is plain regression")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected > 0: inf is behaviour cloning")


class Decisions(NamedTuple):
    """What the networks say about B decisions; every field is (B,); only v, q and logp carry a gradient."""

    level: Tensor  # index into LEVELS
    v: Tensor  # V(s), at the last token of the prompt
    q: Tensor  # Q(s,a), at the last token of the answer
    target_q: Tensor  # Q_target(s,a), what V regresses to
    td_target: Tensor  # reward + discount * V_target(s'), what Q regresses to
    advantage: Tensor  # Q(s,a) - V(s)
    weight: Tensor  # of the decision in the actor loss
    logp: Tensor  # log pi(a|s): sum or mean over its tokens, as token_norm says
    tokens: Tensor  # answer tokens, EOS included


def actor_loss(logp: Tensor, weight: Tensor, count: int | None = None) -> Tensor:
    """L_pi = -E[w * log pi(a|s)], w = exp(A / temperature) held constant  (GLIDER eq. 7). (B,) -> scalar.

    sum / count, by default B. Weight 0 (exp underflows) gives 0 even where log pi is -inf.
    """
    weighted = torch.where(weight > 0, weight.detach() * logp, 0.0)
    return -weighted.sum() / (len(logp) if count is None else count)


def losses(d: Decisions, config: RLConfig, count: int) -> dict[str, Tensor]:
    """The losses of Algorithm 1: sums over these decisions / `count`, the decisions of the whole batch."""
    return {
        "v_loss": expectile_loss(d.target_q - d.v, config.expectile, count),  # eq. 5
        "q_loss": td_loss(d.q, d.td_target, count),  # eq. 4
        "actor_loss": actor_loss(d.logp, d.weight, count),  # eq. 7
    }


class Learner:
    """Policy, critics and their two optimizers; `update` is the algorithm.

    policy: a causal LM of which some parameters require a gradient (LoRA or all). hidden_fn gives the hidden
    states that lm_head reads (last layer, after the final norm). Two optimizers and two clip norms, so that
    large critic gradients never shrink the step of the policy.
    """

    def __init__(self, policy: nn.Module, critics: Critics, hidden_fn: HiddenFn, config: RLConfig):
        self.policy, self.critics, self.hidden_fn, self.config = policy, critics, hidden_fn, config
        self.actor_parameters = [p for p in policy.parameters() if p.requires_grad]
        self.critic_parameters = list(critics.online.parameters())
        if critics.levels != LEVELS:
            raise ValueError(f"critics have levels {critics.levels}, expected {LEVELS}: start a new critic")
        if not self.actor_parameters:
            raise ValueError("no parameter of the policy is trainable: load adapters with is_trainable=True")
        head_weight(policy.get_output_embeddings(), policy.config)  # an unusable head is refused now
        self.actor_optimizer = torch.optim.AdamW(self.actor_parameters, lr=config.actor_lr)
        self.critic_optimizer = torch.optim.AdamW(self.critic_parameters, lr=config.critic_lr)

    def update(self, batches: list[Batch], train_actor: bool = True) -> dict[str, float]:
        """One step on micro-batches that together are one batch; returns `level/quantity` metrics.

        train_actor=False warms the critics up: no gradient through the backbone, the policy stays as it is.
        V, Q and policy all read the parameters from before the step.
        """
        count = sum(len(batch.level) for batch in batches)
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        seen = []
        for batch in batches:
            decisions = self.decide(batch, train_actor)
            sum(losses(decisions, self.config, count).values()).backward()
            seen.append(Decisions(*(column.detach() for column in decisions)))

        metrics = {"critic/grad_norm": self._clip(self.critic_parameters)}
        if train_actor:
            metrics["actor/grad_norm"] = self._clip(self.actor_parameters)
            self.actor_optimizer.step()
        self.critic_optimizer.step()
        self.critics.update_target(self.config.polyak)
        everything = Decisions(*(torch.cat(column) for column in zip(*seen, strict=True)))
        return metrics | level_metrics(everything, self.config)

    def decide(self, batch: Batch, train_actor: bool = True) -> Decisions:
        """One forward on prompt + answer serves V, Q and log pi; one on the next prompt V(s')."""
        config, critics, level = self.config, self.critics, batch.level
        rows = torch.arange(len(level), device=level.device)
        with torch.set_grad_enabled(train_actor):
            hidden = self.hidden_fn(self.policy, batch.input_ids, level)  # (B, T, D)
            weight, bias = head_weight(self.policy.get_output_embeddings())
            _, logp = sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)
        next_value = torch.zeros(
            len(level), device=level.device
        )  # (B,), 0 where the bootstrap is masked anyway
        (alive,) = (~batch.terminated).nonzero(as_tuple=True)
        if len(alive):
            with torch.no_grad():
                next_hidden = self.hidden_fn(
                    self.policy, batch.next_ids[alive], level[alive]
                )  # (alive, T2, D)
            at = next_hidden[torch.arange(len(alive), device=level.device), batch.next_index[alive]]
            next_value[alive] = critics.target_v(at, level[alive])

        # Features are constants of the critic losses: the backbone learns from the actor loss alone.
        state = hidden[rows, batch.state_index].detach()  # (B, D)
        action = hidden[rows, batch.action_index].detach()  # (B, D)
        v, q = critics.v(state, level), critics.q(action, level)  # (B,)
        discount = bootstrap_discount(config.gamma, batch.steps, config.discount)
        advantage = (q - v).detach()
        if config.actor == "awr":
            actor_weight = awr_weight(advantage, config.temperature, config.max_weight)
        else:
            actor_weight = torch.ones_like(advantage)
        tokens = batch.action_mask.sum(1)
        return Decisions(
            level=level,
            v=v,
            q=q,
            target_q=critics.target_q(action, level),
            td_target=td_target(batch.reward, discount, batch.terminated, next_value),
            advantage=advantage,
            weight=actor_weight,
            logp=logp if config.token_norm == "sum" else logp / tokens.clamp_min(1),
            tokens=tokens,
        )

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """Clips in place; returns the norm from before. nan or inf stops the run first."""
        return nn.utils.clip_grad_norm_(parameters, self.config.clip_norm, error_if_nonfinite=True).item()

    def state_dict(self) -> dict:
        """The optimizers; the adapter and the critics are files of their own."""
        return {"actor": self.actor_optimizer.state_dict(), "critic": self.critic_optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.actor_optimizer.load_state_dict(state["actor"])
        self.critic_optimizer.load_state_dict(state["critic"])


def level_metrics(d: Decisions, config: RLConfig) -> dict[str, float]:
    """`level/quantity` for the levels that occur; losses are means over the decisions of their own level."""
    metrics = {}
    for index, name in enumerate(LEVELS):
        at = Decisions(*(column[d.level == index] for column in d))
        count = len(at.level)
        if count == 0:
            continue
        answer_logp = at.logp if config.token_norm == "sum" else at.logp * at.tokens  # (count,)
        quantities = losses(at, config, count) | {
            "value_mean": at.v.mean(),
            "q_mean": at.q.mean(),
            "advantage_mean": at.advantage.mean(),
            "weight_mean": at.weight.mean(),
            "weight_max": at.weight.max(),
            "ess": effective_sample_size(at.weight),  # of `count` decisions
            "logp_mean": answer_logp.sum() / at.tokens.sum(),  # per token
        }
        metrics |= {f"{name}/{quantity}": value.item() for quantity, value in quantities.items()}
    return metrics
