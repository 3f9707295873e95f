"""HiPER's update: from played episodes to advantages, fitted values and a better policy (arXiv:2602.16165).

Beside its hierarchical advantages stand two baselines on the same format: flat GAE (PPO, arXiv:1707.06347)
and the group's mean return instead of a critic (GRPO, arXiv:2402.03300). Advantages are per turn and come
before any padding. What this file does not do: the recursions (critic.py), act (plan_execute.py).
Shapes: N turns of an iteration, T of one episode, B of a batch.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from critic import Values, gae, hierarchical_gae, switch_advantage, switch_advantage_released
from logprob import head_weight, sequence_logprobs
from plan_execute import SWITCH, Decided, PlanExecute, TurnPlayer, TurnRequest, by_length, collate
from prompts import NOT_UNDERSTOOD


@dataclass(frozen=True)
class HiperConfig:
    """What an iteration depends on."""

    advantage: Literal["hiper", "gae", "group"] = "hiper"  # HiPER's, flat PPO's, or GRPO's: no critic
    switch_term: Literal["released", "paper"] = "released"  # third head, or (q - beta)(V_high - V_low)
    gamma: float = 0.99  # discount per environment step (released: 1)
    lam: float = 0.95  # GAE's lambda within a segment, or along a flat episode (released: 1)
    lam_segment: float = 0.95  # lambda over segments
    temperature: float = 0.7  # the policy is softmax(logits / temperature), in play and in every log pi
    limit: Literal["bootstrap", "end"] = "bootstrap"  # what a step limit is; end: a failure, as if terminated
    format_penalty: float = 0.1  # cost of a turn that is not in the format
    invalid_penalty: float = 0.0  # cost of an action not understood; with --give-up it pays to give up
    clip: float = 0.2  # PPO: the ratio counts within 1 - clip and 1 + clip
    kl: float = 0.01  # weight of the k3 estimate of KL(pi || pi_init)
    turns: int = 1024  # of an iteration that the policy is trained on, drawn at random; the values see all
    batch_size: int = 128  # turns per gradient step
    lr: float = 1e-4  # AdamW step size of the policy; falls linearly to 0 over a run (released: constant)
    value_lr: float = 1e-3  # AdamW step size of the values
    value_epochs: int = 4  # passes of the values over an iteration's turns
    clip_norm: float = 1.0  # ceiling of the gradient norm


# --- the algorithm ------------------------------------------------------------------------------------------
class Trace(NamedTuple):
    """One episode of T turns, as numbers; v_*: (T + 1,), the last of the observation after the last turn."""

    reward: Tensor  # (T,) of the environment, less penalties
    switched: Tensor  # (T,) bool
    probability: Tensor  # (T,) beta = pi(switch)
    terminated: bool
    v_high: Tensor  # V(s)
    v_low: Tensor  # V(s, subgoal chosen)
    v_term: Tensor  # third head: V(s, subgoal on arrival)
    v_keep: Tensor  # V_low(s, subgoal on arrival); of switch_term="paper" alone


def estimate(trace: Trace, config: HiperConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages (T, 3) of switch, subgoal and action, and targets (T,) of the values they came from.

    A target is advantage + value, as released; nan where the value has none.
    """
    r, q, gamma = trace.reward, trace.switched, config.gamma
    end = 0.0 if trace.terminated or config.limit == "end" else 1.0  # else from the next observation
    high, low, term = trace.v_high[:-1], trace.v_low[:-1], trace.v_term[:-1]
    final_high, final_low = end * trace.v_high[-1].item(), end * trace.v_low[-1].item()
    if config.advantage == "gae":
        after = torch.cat([high[1:], torch.tensor([final_high])])
        flat = gae(r, high, after, torch.full_like(r, gamma * config.lam), torch.full_like(r, gamma))
        return flat[:, None].expand(-1, 3), {"high": flat + high}
    a_low, a_high = hierarchical_gae(
        r, q, low, high, gamma, config.lam, config.lam_segment, final_low, final_high
    )
    returned = switch_advantage_released(r, q, high, torch.zeros_like(r), gamma, final_high)
    a_switch = returned - term
    if config.switch_term == "paper":
        a_switch = switch_advantage(q, trace.probability, high, trace.v_keep[:-1])
    targets = {"high": a_high + high, "low": a_low + low, "term": returned}
    return torch.stack([a_switch, a_high, a_low], 1), targets


def group_advantage(returns: Tensor) -> Tensor:
    """(R - mean) / std within a group of plays of one game, 0 where all are equal (GRPO). (G,) -> (G,)."""
    return (returns - returns.mean()) / (returns.std(correction=0) + 1e-6)


def whiten(x: Tensor) -> Tensor:
    """(N,) -> mean 0, standard deviation 1 over what is not nan; nan becomes 0."""
    known = x[x.isfinite()]
    return torch.where(x.isfinite(), (x - known.mean()) / (known.std(correction=0) + 1e-6), 0.0)


def clipped_loss(logp: Tensor, old: Tensor, advantage: Tensor, clip: float, count: int) -> Tensor:
    """PPO's -E[min(ratio A, clip(ratio) A)] over decided tokens (N,); sum / count  (arXiv:1707.06347, eq. 7).

    Where A < 0 the loss is at most 3 |A|, whatever the ratio (dual clip, arXiv:1912.09729, c = 3).
    """
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -torch.where(advantage < 0, torch.maximum(gain, 3 * advantage), gain).sum() / count


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || pi_ref) estimated per sampled token: exp(d) - d - 1, d = log pi_ref - log pi; at most 10."""
    d = reference - logp
    return (d.clamp(max=20).exp() - d - 1).clamp(max=10)  # no gradient where it is larger, as released


def rewards(player: TurnPlayer, config: HiperConfig) -> Tensor:
    """(T,): the environment's reward of each turn, less the penalties."""
    costs = [
        config.format_penalty * (not turn.valid) + config.invalid_penalty * obs.startswith(NOT_UNDERSTOOD)
        for turn, obs in zip(player.turns, player.answers(), strict=True)
    ]
    return torch.tensor([turn.reward for turn in player.episode.turns]) - torch.tensor(costs)


@torch.no_grad()
def traces(
    players: list[TurnPlayer], policy: PlanExecute, values: Values, config: HiperConfig
) -> list[Trace]:
    """The numbers of each episode; values read the hidden states that acting left, and those at a limit."""
    reads_limit = config.limit == "bootstrap" and config.advantage != "group"
    cut = [p for p in players if reads_limit and not p.now.terminated]
    after = dict(zip(map(id, cut), policy.look([p.request() for p in cut]) if cut else [], strict=True))
    device, found = next(values.parameters()).device, []

    def read(hidden: Tensor) -> dict[str, Tensor]:
        return {name: v.cpu() for name, v in values(hidden.to(device)).items()}

    for p in players:
        last = after.get(id(p), torch.zeros_like(p.turns[0].hidden))  # not read where nothing follows
        v = read(torch.stack([*(turn.hidden for turn in p.turns), last]))
        other = [t for t, turn in enumerate(p.turns) if turn.switched and t]
        if config.switch_term == "paper" and config.advantage == "hiper" and other:
            asked = [TurnRequest("executor", p.turns[t].prompt, 0, 0, p.turns[t - 1].goal) for t in other]
            v["keep"] = v["low"].index_copy(0, torch.tensor(other), read(policy.look(asked))["low"])
        switched = torch.tensor([turn.switched for turn in p.turns])
        word = torch.tensor([turn.logp_of(SWITCH) for turn in p.turns]).exp()  # pi(what was said)
        found.append(
            Trace(
                rewards(p, config), switched, torch.where(switched, word, 1 - word), p.now.terminated,
                v["high"], v["low"], v["term"], v.get("keep", v["low"]),
            )
        )  # fmt: skip
    return found


def advantages(
    players: list[TurnPlayer], found: list[Trace], config: HiperConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of all turns of an iteration in order: advantages (N, 3), and targets (N,) of the values."""
    if config.advantage == "group":
        returns = torch.stack([trace.reward.sum() for trace in found])
        games = [(p.episode.task, p.episode.variation) for p in players]
        for game in set(games):
            rows = torch.tensor([g == game for g in games])
            returns[rows] = group_advantage(returns[rows])
        lengths = torch.tensor([len(trace.reward) for trace in found])
        return returns.repeat_interleave(lengths)[:, None].expand(-1, 3), {}
    per_episode = [estimate(trace, config) for trace in found]
    advantage = torch.cat([a for a, _ in per_episode])
    targets = {name: torch.cat([t[name] for _, t in per_episode]) for name in per_episode[0][1]}
    return torch.stack([whiten(column) for column in advantage.unbind(1)], 1), targets


def fit(
    values: Values, optimizer, turns: list[Decided], targets: dict[str, Tensor], config: HiperConfig, rng
) -> dict[str, float]:
    """Some passes of squared error of each value against its targets; nan is none. -> metrics from before."""
    if not targets:
        return {}
    device = next(values.parameters()).device
    hidden, metrics = torch.stack([turn.hidden for turn in turns]).to(device), {}
    with torch.no_grad():
        before = values(hidden)
    for name, target in targets.items():
        known = target.isfinite()
        target, v = target[known], before[name].cpu()[known]
        metrics[f"{name}/explained_variance"] = 1 - ((target - v).var() / target.var().clamp_min(1e-8)).item()
        metrics[f"{name}/value_mean"] = v.mean().item()
    for _ in range(config.value_epochs):
        for rows in torch.randperm(len(turns), generator=rng).split(256):
            v, loss = values(hidden[rows]), 0.0
            for name, target in targets.items():
                error = v[name] - target[rows].to(device)
                loss = loss + torch.where(error.isfinite(), error, 0.0).pow(2).sum() / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return metrics


def improve(
    policy: nn.Module,
    reference: nn.Module,
    hidden_fn,
    optimizer,
    turns: list[Decided],
    advantage: Tensor,
    encode,
    max_tokens: int,
    config: HiperConfig,
    rng: torch.Generator,
) -> dict[str, float]:
    """One pass of gradient steps over turns drawn at random: the clipped loss, and k3 to the reference.

    hidden_fn(model, ids (B, T)) -> (B, T, D). advantage (N, 3). encode, max_tokens: as in by_length.
    """
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sums, device = dict.fromkeys(("loss", "kl", "clipped", "grad_norm"), 0.0), weight.device
    drawn = torch.randperm(len(turns), generator=rng)[: config.turns].split(config.batch_size)

    def logp(model: nn.Module, ids: Tensor, decided: Tensor) -> Tensor:
        hidden, t = hidden_fn(model, ids), config.temperature
        return sequence_logprobs(hidden, weight, ids, decided, bias=bias, temperature=t)[0][decided]

    for rows in drawn:
        batch = [turns[i] for i in rows]
        count = sum(k > 0 for turn in batch for k in turn.part)  # decided tokens of the whole batch
        optimizer.zero_grad()
        for group in by_length(batch, encode, max_tokens):
            part = collate([batch[i] for i in group], encode, advantage[rows[group]]).to(device)
            decided = part.part > 0
            old, better = part.logprobs[decided], part.advantage[decided]
            new = logp(policy, part.input_ids, decided)
            with torch.no_grad():
                near = logp(reference, part.input_ids, decided)
            loss, kl = clipped_loss(new, old, better, config.clip, count), k3(new, near).sum() / count
            (loss + config.kl * kl).backward()
            sums["loss"] += loss.item()
            sums["kl"] += kl.item()
            sums["clipped"] += ((new - old).exp() - 1).abs().gt(config.clip).sum().item() / count
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm, error_if_nonfinite=True)
        sums["grad_norm"] += norm.item()
        optimizer.step()
    return {f"policy/{name}": total / len(drawn) for name, total in sums.items()}


def behaviour(players: list[TurnPlayer]) -> dict[str, float]:
    """How the agent played; a collapse shows here first (diagnostics.PLAY_ALARMS)."""
    turns, later = ([turn for p in players for turn in p.turns[first:]] for first in (0, 1))
    decided = [x for turn in turns for x, k in zip(turn.logprobs, turn.part, strict=True) if k]
    understood = [not obs.startswith(NOT_UNDERSTOOD) for p in players for obs in p.answers()]
    return {
        "play/score": sum(max(0.0, p.now.score) for p in players) / len(players),
        "play/success": 100 * sum(p.now.success for p in players) / len(players),
        "play/turns": len(turns) / len(players),
        "play/switch_rate": sum(turn.switched for turn in later) / max(1, len(later)),
        "play/segment_length": len(turns) / sum(turn.switched for turn in turns),
        "play/format_rate": sum(turn.valid for turn in turns) / len(turns),
        "play/understood": sum(understood) / len(understood),
        "play/answer_tokens": len(decided) / len(turns),
        "play/entropy": -sum(decided) / len(decided),
    }
