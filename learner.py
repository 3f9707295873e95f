"""One gradient step of offline RL: V, Q, policy, target (GLIDER, arXiv:2505.19761, Algorithm 1).

The default is the IQL reading (arXiv:2110.06169) of GLIDER and STEP-HRL (arXiv:2604.05808); readings.py names
the others. What this file does not do: choose the data, act, or switch dropout off (model.add_lora sets none;
a backbone's own stays on).
Shapes: B decisions, T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batches import Batch
from candidates import predictor, tree_attention
from critic import (
    Critics,
    awr_weight,
    bootstrap_discount,
    conservative_loss,
    expectile_loss,
    td_loss,
    td_target,
)
from data import LEVELS
from diagnostics import level_quantities
from logprob import head_weight, sequence_logprobs
from model import without_adapters
from readings import RLConfig
from run import gather, sum_gradients, sum_over_processes

# (policy, input_ids (B, T), level (B,), **inputs of packed rows) -> what lm_head reads (B, T, D)
HiddenFn = Callable[..., Tensor]


class Decisions(NamedTuple):
    """What the networks say about B decisions; every field is (B,).

    v, q and policy_q carry a gradient to the heads; logp to the policy after the warm-up, with td3_bc also
    policy_logp. policy_*: of the answer u that the policy sampled for the same prompt; 0 without one.
    """

    level: Tensor  # index into LEVELS
    v: Tensor  # V(s), at the last token of the prompt
    q: Tensor  # Q(s,a), at the last token of the answer
    v_target: Tensor  # what V regresses to: Q_target(s,a), or as value_answers and value_reads say
    td_target: Tensor  # reward + discount * V_target(s'), what Q regresses to
    advantage: Tensor  # Q(s,a) - V(s)
    weight: Tensor  # of the decision in the actor loss
    logp: Tensor  # log pi(a|s): sum or mean over its tokens, as token_norm says
    policy_q: Tensor  # Q(s,u)
    policy_logp: Tensor  # log pi(u|s), always the sum over its tokens
    tokens: Tensor  # answer tokens, EOS included
    expert: Tensor  # whether an expert made it
    behavior_logp: Tensor  # log pi of the answer when it was sampled; nan for an expert
    mc_return: Tensor  # Monte-Carlo return; nan where it is not known


# --- the losses -------------------------------------------------------------------------------------------
def actor_weight(
    advantage: Tensor, target_q: Tensor, level: Tensor, expert: Tensor, config: RLConfig
) -> Tensor:
    """w of each decision in L_pi, held constant. All (B,) -> (B,).

    awr               exp(A / temperature), with a ceiling  (GLIDER eq. 7)
    q_weighted        Q_target(s,a)  (GLIDER's code)
    signed_advantage  A, which pushes poor answers down without bound  (STEP-HRL's code)
    bc, td3_bc        1
    rl_levels="planner": below the planner 1 for an expert's decision and 0 for a rollout's  (GLIDER's code)
    """
    if config.actor == "awr":
        weight = awr_weight(advantage, config.temperature, config.max_weight)
    elif config.actor == "q_weighted":
        weight = target_q.detach()
    elif config.actor == "signed_advantage":
        weight = advantage.detach()
    else:
        weight = torch.ones_like(advantage)
    if config.rl_levels == "planner":
        weight = torch.where(level == LEVELS.index("planner"), weight, expert.to(weight.dtype))
    return weight


def actor_loss(logp: Tensor, weight: Tensor, count: int | None = None) -> Tensor:
    """L_pi = -E[w * log pi(a|s)], w of actor_weight, held constant  (GLIDER eq. 7). Both (B,) -> scalar.

    sum / count, by default B. Weight 0 (exp underflows) gives 0 even where log pi is -inf.
    """
    weighted = torch.where(weight != 0, weight.detach() * logp, 0.0)
    return -weighted.sum() / (len(logp) if count is None else count)


def policy_gradient_loss(policy_logp: Tensor, policy_advantage: Tensor, count: int | None = None) -> Tensor:
    """-E_{u~pi}[A(s,u) * log pi(u|s)]: its gradient is that of -E_{u~pi}[Q(s,u)]  (REINFORCE, baseline V).

    Both (B,) -> scalar: sum / count, by default B; A is held constant. It replaces -Q(s, pi(s)) of TD3+BC
    (arXiv:2106.06860, eq. 3): one cannot differentiate Q in a sampled text.
    """
    return -(policy_advantage.detach() * policy_logp).sum() / (len(policy_logp) if count is None else count)


def losses(d: Decisions, config: RLConfig, count: int, q_scale: float = 1.0) -> dict[str, Tensor]:
    """The losses of Algorithm 1: sums over these decisions / `count`, the decisions of the whole batch.

    GLIDER eqs. 5, 4, 7; CQL (arXiv:2006.04779) eq. 2; TD3+BC eq. 3, whose unit is q_scale = mean |Q(s,u)|.
    """
    expectile = config.expectile if config.expectile_side == "upper" else 1 - config.expectile
    terms = {
        "v_loss": expectile_loss(d.v_target - d.v, expectile, count),  # eq. 5
        "q_loss": td_loss(d.q, d.td_target, count),  # eq. 4
        "actor_loss": actor_loss(d.logp, d.weight, count),  # eq. 7
    }
    if config.conservative > 0:
        terms["cql_loss"] = config.conservative * conservative_loss(d.policy_q, d.q, count)
    if config.actor == "td3_bc":
        gradient = policy_gradient_loss(d.policy_logp, d.policy_q - d.v, count)
        terms["pg_loss"] = config.td3_alpha / q_scale * gradient
    return terms


# --- what the heads read ------------------------------------------------------------------------------------
def at_columns(hidden: Tensor, columns: Tensor) -> Tensor:
    """hidden (B, T, D) at columns (B, k) of each row -> (B, k, D)."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], columns]


class FrozenFeatures:
    """Hidden states of the backbone without its adapter, after a sequence of tokens: each computed once.

    They never change, so the tokens themselves are the key: an epoch later nothing is computed, and the next
    prompt of one decision is the prompt of another.
    """

    def __init__(self, policy: nn.Module, hidden_fn: HiddenFn):
        self.policy, self.hidden_fn, self.known = policy, hidden_fn, {}

    @torch.no_grad()
    def __call__(self, ids: Tensor, columns: Tensor, level: Tensor) -> Tensor:
        """ids (B, T), columns (B, k) -> (B, k, D); only rows with something new go through the backbone."""
        tokens, ends = ids.cpu().numpy(), columns.tolist()
        keys = [[tokens[row, : end + 1].tobytes() for end in ends[row]] for row in range(len(ids))]
        new = [row for row, own in enumerate(keys) if not self.known.keys() >= set(own)]
        if new:
            with without_adapters(self.policy):
                hidden = self.hidden_fn(self.policy, ids[new], level[new])
            for row, features in zip(new, at_columns(hidden, columns[new]), strict=True):
                self.known.update(zip(keys[row], features, strict=True))
        return torch.stack([torch.stack([self.known[key] for key in own]) for own in keys])


# --- the step ---------------------------------------------------------------------------------------------
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
        if config.features == "frozen" and not hasattr(policy, "peft_config"):
            raise ValueError("features='frozen' needs an adapter to leave out: train with --rank above 0")
        head_weight(policy.get_output_embeddings(), policy.config)  # an unusable head is refused now
        self.frozen = FrozenFeatures(policy, hidden_fn)
        self.actor_optimizer = torch.optim.AdamW(self.actor_parameters, lr=config.actor_lr)
        self.critic_optimizer = torch.optim.AdamW(self.critic_parameters, lr=config.critic_lr)

    def update(self, batches: list[Batch], train_actor: bool = True) -> dict[str, float]:
        """One step of Algorithm 1, L_V + L_Q + L_pi and then the target, on micro-batches of one batch.

        Returns `level/quantity` metrics.

        train_actor=False warms the critics up: no gradient through the backbone, the policy stays as it is.
        V, Q and policy all read the parameters from before the step.
        """
        count = round(sum_over_processes(sum(len(batch.level) for batch in batches)))
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        q_scale = self._mean_absolute_q(batches) if self.config.actor == "td3_bc" and train_actor else 1.0
        seen = []
        for batch in batches:
            decisions = self.decide(batch, train_actor)
            sum(losses(decisions, self.config, count, q_scale).values()).backward()
            seen.append(Decisions(*(column.detach().cpu() for column in decisions)))

        sum_gradients(self.critic_parameters + self.actor_parameters)
        metrics = {"critic/grad_norm": self._clip(self.critic_parameters)}
        if train_actor:
            metrics["actor/grad_norm"] = self._clip(self.actor_parameters)
            self.actor_optimizer.step()
        self.critic_optimizer.step()
        self.critics.update_target(self.config.polyak)
        whole = Decisions(*(torch.cat(column) for column in zip(*gather(seen), strict=True)))
        for index, name in enumerate(LEVELS):
            own = Decisions(*(column[whole.level == index] for column in whole))
            if len(own.level):
                of_level = losses(own, self.config, len(own.level), q_scale)
                of_level |= level_quantities(own, self.config.token_norm)
                metrics |= {f"{name}/{quantity}": value.item() for quantity, value in of_level.items()}
        return metrics

    def decide(self, batch: Batch, train_actor: bool = True) -> Decisions:
        """One forward on the next prompt: V(s'); one on prompt and answers: V(s), Q(s,a), log pi(a|s)."""
        config, critics, level, segment = self.config, self.critics, batch.level, batch.segment
        tokens, inputs = batch.action_mask.sum(1), self._inputs(batch)
        discount = bootstrap_discount(config.gamma, batch.steps, config.discount)
        # First what keeps no graph: its peak of memory then does not stand on that of the actor's forward.
        target = td_target(batch.reward, discount, batch.terminated, self._next_value(batch))
        with torch.set_grad_enabled(train_actor):
            hidden = self.hidden_fn(self.policy, batch.input_ids, level, **inputs)  # (B, T, D)
            weight, bias = head_weight(self.policy.get_output_embeddings())
            per_token, _ = sequence_logprobs(
                hidden, weight, batch.input_ids, segment > 0, predictor(segment), bias=bias
            )
        logp = torch.where(segment == 1, per_token, 0.0).sum(1)  # (B,)
        state, action, *policy_action = self._features(batch, hidden)  # (B, D) each
        v, q, target_q = critics.v(state, level), critics.q(action, level), critics.target_q(action, level)
        v_target, policy_q, policy_logp = target_q, torch.zeros_like(q), torch.zeros_like(q)
        if config.samples_answers:
            policy_q = critics.q(*policy_action, level)
            policy_logp = torch.where(segment == 2, per_token, 0.0).sum(1)
            if config.value_answers == "policy":
                v_target = critics.target_q(*policy_action, level)
        if config.value_reads == "prompt":
            v_target = critics.target_q(state, level)
        earned = torch.where(batch.mc_return.isfinite(), batch.mc_return, q)
        advantage = ((q if config.advantage == "q" else earned) - v).detach()
        return Decisions(
            level=level,
            v=v,
            q=q,
            v_target=v_target,
            td_target=target,
            advantage=advantage,
            weight=actor_weight(advantage, target_q, level, batch.expert, config),
            logp=logp if config.token_norm == "sum" else logp / tokens.clamp_min(1),
            policy_q=policy_q,
            policy_logp=policy_logp,
            tokens=tokens,
            expert=batch.expert,
            behavior_logp=batch.behavior_logp,
            mc_return=batch.mc_return,
        )

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Mask and positions of rows that hold a second answer to the prompt, the policy's own."""
        if not self.config.samples_answers:
            return {}
        if (batch.policy_index < 0).any():
            raise ValueError("this reading needs answers of the policy: collate(..., policy_answers=...)")
        return tree_attention(self.policy, batch.segment)

    def _features(self, batch: Batch, hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the heads read of s, of a and, if asked for, of the policy's answer: (B, D) each."""
        columns = [batch.state_index, batch.action_index]
        if self.config.samples_answers:
            columns.append(batch.policy_index)
        inputs = self._inputs(batch)
        return self._read(batch.input_ids, torch.stack(columns, 1), batch.level, hidden, **inputs).unbind(1)

    @torch.no_grad()
    def _read(self, ids: Tensor, columns: Tensor, level: Tensor, hidden: Tensor | None = None, **inputs):
        """ids (B, T), columns (B, k) -> (B, k, D), constants: the backbone learns from the actor loss alone.

        hidden: the actor's (B, T, D), if known.
        """
        if self.config.features == "frozen":
            if not inputs:
                return self.frozen(ids, columns, level)
            with without_adapters(self.policy):  # an answer sampled now is never seen again
                return at_columns(self.hidden_fn(self.policy, ids, level, **inputs), columns)
        if hidden is None:
            hidden = self.hidden_fn(self.policy, ids, level, **inputs)
        return at_columns(hidden, columns)

    def _next_value(self, batch: Batch) -> Tensor:
        """(B,): V_target(s'), or Q_target(s',a'). 0 if terminated, and for Q where the data stop (GLIDER)."""
        critics, value = self.critics, torch.zeros_like(batch.reward)
        follows, at, read = ~batch.terminated, batch.next_index, critics.target_v
        if self.config.bootstrap == "next_q":
            at, read = batch.next_action_index, critics.target_q
            follows = follows & (at >= 0)
        (rows,) = follows.nonzero(as_tuple=True)
        if len(rows):
            level = batch.next_level[rows]
            features = self._read(batch.next_ids[rows], at[rows, None], level)  # (rows, 1, D)
            value[rows] = read(features[:, 0], level)
        return value

    def _mean_absolute_q(self, batches: list[Batch]) -> float:
        """mean |Q(s,u)| of the whole batch, before any of it is trained on, so that its parts agree on it."""
        total, count = 0.0, sum(len(batch.level) for batch in batches)
        for batch in batches:
            total += self.critics.q(self._features(batch)[2], batch.level).abs().sum().item()
        return max(sum_over_processes(total) / sum_over_processes(count), 1e-3)

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """Clips in place; returns the norm from before. nan or inf stops the run first."""
        return nn.utils.clip_grad_norm_(parameters, self.config.clip_norm, error_if_nonfinite=True).item()

    def state_dict(self) -> dict:
        """The optimizers; the adapter and the critics are files of their own."""
        return {"actor": self.actor_optimizer.state_dict(), "critic": self.critic_optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict gave."""
        self.actor_optimizer.load_state_dict(state["actor"])
        self.critic_optimizer.load_state_dict(state["critic"])
