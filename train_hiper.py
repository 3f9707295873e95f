"""Script: HiPER, online plan-execute RL with hierarchical advantage estimation (arXiv:2602.16165).

    python train_sft.py --plan-execute --env alfworld --data out/gold.jsonl --out out/pe
    python train_hiper.py --init out/pe --env alfworld --panel demo --out out/hiper

In iterations: play episodes, fit the values, estimate advantages, one pass of clipped policy-gradient steps.
--advantage chooses the estimator on the same format: HiPER's, flat GAE (PPO), or the group's (GRPO).
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import annotate
from critic import Values, gae, hierarchical_gae, switch_advantage, switch_advantage_released
from data import Episode
from diagnostics import Watch
from envs import EnvName, EnvPool, read_panel
from hierarchy import Counts, episode_seed, rollout
from logprob import head_weight, sequence_logprobs
from model import hidden_states, lm_of, load_policy, save_policy, trainable_state
from plan_execute import (
    ACTION,
    GOAL,
    SWITCH,
    Decided,
    PlanExecute,
    TurnPlayer,
    TurnRequest,
    by_length,
    collate,
)
from prompts import NOT_UNDERSTOOD
from run import Run, fail, pick_device, provenance
from scores import macro_mean


@dataclass(frozen=True)
class Config:
    init: Path  # plan-execute checkpoint to start from, and to stay near to (train_sft.py --plan-execute)
    out: Path  # run folder
    env: EnvName = "alfworld"  # which text world
    panel: str = "demo"  # played from its train split
    dev: str = "valid_seen"  # split on which it is evaluated, greedily; "" never
    dev_limit: int = 0  # of it the first so many of each task; 0 is all
    advantage: Literal["hiper", "gae", "group"] = "hiper"  # HiPER's, flat PPO's, or GRPO's: no critic
    switch_term: Literal["released", "paper"] = "released"  # third head, or (q - beta)(V_high - V_low)
    episodes: int = 2000  # episodes to play in all
    per_iteration: int = 32  # of them per iteration
    group: int = 8  # plays of the same game in an iteration (GRPO's group; the others play as it does)
    warmup: int = 2  # first iterations that fit the values only (none without a critic)
    gamma: float = 0.99  # discount per environment step (released: 1)
    lam: float = 0.95  # GAE's lambda within a segment, or along a flat episode (released: 1)
    lam_segment: float = 0.95  # lambda over segments
    format_penalty: float = 0.1  # cost of a turn that is not in the format
    invalid_penalty: float = 0.0  # cost of an action that the world does not understand
    clip: float = 0.2  # PPO: the ratio counts within 1 - clip and 1 + clip
    kl: float = 0.01  # weight of the k3 estimate of KL(pi || pi_init)
    batch_size: int = 128  # turns per gradient step
    lr: float = 3e-4  # AdamW step size of the policy
    value_lr: float = 1e-3  # AdamW step size of the values
    value_epochs: int = 4  # passes of the values over an iteration's turns
    clip_norm: float = 1.0  # ceiling of the gradient norm
    temperature: float = 1.0  # of play
    max_steps: int = 50  # environment steps per episode
    tokens_per_forward: int = 4096  # padded tokens of a micro-batch
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products, in play too; weights stay fp32 on CPU
    eval_every: int = 500  # episodes between evaluations
    slots: int = 64  # episodes played at once
    workers: int = 0  # simulator processes; 0 is right for ALFWorld, ScienceWorld is faster with 2
    seed: int = 0
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


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


def estimate(trace: Trace, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages (T, 3) of switch, subgoal and action, and targets (T,) of the values they came from.

    A target is advantage + value, as released; nan where the value has none.
    """
    r, q, gamma = trace.reward, trace.switched, config.gamma
    end = 0.0 if trace.terminated else 1.0  # a time limit bootstraps from the next observation
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
    """Estimate of KL(pi || pi_ref) per sampled token: exp(d) - d - 1, d = log pi_ref - log pi in [-10, 10]."""
    d = (reference - logp).clamp(-10, 10)
    return d.exp() - d - 1


# --- play ---------------------------------------------------------------------------------------------------
def play(
    pool: EnvPool, panel: list, policy: PlanExecute, config: Config, seed: int, source: str
) -> list[TurnPlayer]:
    """The players of all episodes of `panel`, which may repeat a game, in its order."""
    players, judge = {}, annotate.rules(config.env).judge

    def make(episode: Episode, first, place: int) -> TurnPlayer:
        players[place] = TurnPlayer(episode, first, episode_seed(seed, place), judge)
        return players[place]

    for _ in rollout(pool, panel, policy, judge, env=config.env, source=source, counts=Counts(), make=make):
        pass
    return [players[place] for place in range(len(panel))]


def rewards(player: TurnPlayer, config: Config) -> Tensor:
    """(T,): the environment's, less the penalties."""
    episode, costs = player.episode, []
    for t, turn in enumerate(player.turns):
        answer = episode.obs_after(t) if t + 1 < len(episode.turns) else player.now.obs
        invalid = answer.startswith(NOT_UNDERSTOOD)
        costs.append(config.format_penalty * (not turn.valid) + config.invalid_penalty * invalid)
    return torch.tensor([turn.reward for turn in episode.turns]) - torch.tensor(costs)


@torch.no_grad()
def traces(players: list[TurnPlayer], policy: PlanExecute, values: Values, config: Config) -> list[Trace]:
    """The numbers of each episode; values read the hidden states that acting left, and those at a limit."""
    cut = [p for p in players if not p.now.terminated]
    after = policy.look([p.request() for p in cut]) if cut else []
    after = {id(p): hidden for p, hidden in zip(cut, after, strict=True)}
    found = []
    for p in players:
        last = after.get(id(p), torch.zeros_like(p.turns[0].hidden))
        v = values(torch.stack([*(turn.hidden for turn in p.turns), last]))
        keep = v["low"].clone()
        other = [t for t, turn in enumerate(p.turns) if turn.switched and t]
        if config.switch_term == "paper" and other:
            asked = [TurnRequest("executor", p.turns[t].prompt, 0, 0, p.turns[t - 1].goal) for t in other]
            keep[other] = values(policy.look(asked))["low"]
        said = [
            math.exp(sum(x for x, k in zip(t.logprobs, t.part, strict=True) if k == SWITCH)) for t in p.turns
        ]
        switched = torch.tensor([turn.switched for turn in p.turns])
        beta = torch.where(switched, torch.tensor(said), 1 - torch.tensor(said))
        found.append(
            Trace(rewards(p, config), switched, beta, p.now.terminated, v["high"], v["low"], v["term"], keep)
        )
    return found


def advantages(
    players: list[TurnPlayer], found: list[Trace], config: Config
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
    values: Values, optimizer, turns: list[Decided], targets: dict[str, Tensor], config: Config, rng
) -> dict:
    """Some passes of squared error of each value against its targets (nan: none)."""
    hidden, device = torch.stack([turn.hidden for turn in turns]), next(values.parameters()).device
    explained = {}
    with torch.no_grad():
        before = {name: v.cpu() for name, v in values(hidden.to(device)).items()}
    for name, target in targets.items():
        known = target.isfinite()
        left = (target - before[name])[known].var() / target[known].var().clamp_min(1e-8)
        explained |= {
            f"{name}/explained_variance": 1 - left.item(),
            f"{name}/value_mean": before[name][known].mean().item(),
        }
    for _ in range(config.value_epochs if targets else 0):
        for rows in torch.randperm(len(turns), generator=rng).split(256):
            v, loss = values(hidden[rows].to(device)), 0.0
            for name, target in targets.items():
                known = target[rows].isfinite()
                loss = loss + (v[name] - target[rows].nan_to_num().to(device))[known.to(device)].pow(
                    2
                ).sum() / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return explained


def improve(
    policy, reference, optimizer, turns: list[Decided], advantage: Tensor, encode, config: Config, rng
) -> dict:
    """One pass of gradient steps over the turns, in random batches."""
    weight, bias = head_weight(policy.get_output_embeddings(), lm_of(policy).config)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sums, device = dict.fromkeys(("loss", "kl", "clipped", "tokens", "norm", "steps"), 0.0), weight.device

    def logp(model, ids: Tensor, part: Tensor) -> Tensor:
        hidden = hidden_states(model, ids, torch.zeros(len(ids)), config.precision)
        return sequence_logprobs(hidden, weight, ids, part > 0, bias=bias)[0]

    for rows in torch.randperm(len(turns), generator=rng).split(config.batch_size):
        batch = [turns[i] for i in rows]
        count = sum(p > 0 for turn in batch for p in turn.part)
        optimizer.zero_grad()
        for group in by_length(batch, encode, config.tokens_per_forward):
            part = collate([batch[i] for i in group], encode, advantage[rows[group]])
            ids, decided = part.input_ids.to(device), part.part.to(device)
            new, mask = logp(policy, ids, decided), decided > 0
            with torch.no_grad():
                near = logp(reference, ids, decided)[mask]
            new, old, adv = new[mask], part.logprobs.to(device)[mask], part.advantage.to(device)[mask]
            loss, kl = clipped_loss(new, old, adv, config.clip, count), k3(new, near).sum() / count
            (loss + config.kl * kl).backward()
            sums["loss"] += loss.item()
            sums["kl"] += kl.item()
            sums["clipped"] += ((new - old).exp() - 1).abs().gt(config.clip).sum().item()
            sums["tokens"] += len(new)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm, error_if_nonfinite=True)
        optimizer.step()
        sums["norm"], sums["steps"] = sums["norm"] + norm.item(), sums["steps"] + 1
    steps = sums["steps"]
    return {
        "actor/loss": sums["loss"] / steps, "actor/kl": sums["kl"] / steps, "actor/grad_norm": sums["norm"] / steps,
        "actor/clipped": sums["clipped"] / max(1, sums["tokens"]),
    }  # fmt: skip


def behaviour(players: list[TurnPlayer]) -> dict[str, float]:
    """How the agent played: its collapse shows here first."""
    turns = [turn for p in players for turn in p.turns]
    later = [turn for p in players for turn in p.turns[1:]]
    decided = [(x, k) for turn in turns for x, k in zip(turn.logprobs, turn.part, strict=True) if k]
    answers = [
        (p.episode.turns + [None])[t + 1].obs if t + 1 < len(p.turns) else p.now.obs
        for p in players for t in range(len(p.turns))
    ]  # fmt: skip
    return {
        "play/score": sum(max(0.0, p.now.score) for p in players) / len(players),
        "play/success": 100 * sum(p.now.success for p in players) / len(players),
        "play/turns": len(turns) / len(players),
        "play/switch_rate": sum(turn.switched for turn in later) / max(1, len(later)),
        "play/segment_length": len(turns) / sum(turn.switched for turn in turns),
        "play/format_rate": sum(turn.valid for turn in turns) / len(turns),
        "play/understood": sum(not a.startswith(NOT_UNDERSTOOD) for a in answers) / len(answers),
        "play/answer_tokens": len(decided) / len(turns),
        "play/entropy": -sum(x for x, _ in decided) / len(decided),
    }


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = pick_device(config.device)
    policy, tokenizer, meta = load_policy(config.init, device, True)
    if meta.get("format") != "plan-execute":
        raise ValueError(f"{config.init} does not speak the plan-execute format: train_sft.py --plan-execute")
    if config.per_iteration % config.group:
        raise ValueError(
            f"--per-iteration is {config.per_iteration}, expected a multiple of --group {config.group}"
        )
    reference, _, _ = load_policy(config.init, device)
    panel = read_panel(config.env, config.panel, "train")
    dev = read_panel(config.env, config.panel, config.dev, config.dev_limit) if config.dev else []
    run = Run(config.out, config, config.resume)
    values = Values(lm_of(policy).config.hidden_size).to(device)
    actor = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=config.lr)
    critic = torch.optim.AdamW(values.parameters(), lr=config.value_lr)
    played, iteration, evals = 0, 0, []
    if state := run.load_state():
        policy.load_state_dict(state["policy"], strict=False)
        values.load_state_dict(state["values"])
        actor.load_state_dict(state["actor"])
        critic.load_state_dict(state["critic"])
        iteration, played, evals = state["step"], state["played"], state["evals"]
    watch, began = Watch(), time.time()
    bar = tqdm(total=config.episodes, initial=played, unit="episode", desc="hiper")

    with EnvPool(config.env, config.slots, config.workers, config.max_steps) as pool:

        def player_of(temperature: float) -> PlanExecute:
            return PlanExecute(policy, tokenizer, temperature, precision=config.precision)

        def evaluate() -> dict[str, float]:
            done = play(pool, dev, player_of(0.0), config, config.seed, "eval")
            scores = [max(0.0, p.now.score) for p in done]
            evals.append({"episodes": played, "games": dev, "scores": scores})
            (config.out / "evals.json").write_text(json.dumps({"evals": evals} | provenance()) + "\n")
            found = {"dev/score": macro_mean([p.episode.task for p in done], scores)}
            return found | {
                "dev/success": 100 * sum(p.now.success for p in done) / len(done),
                "dev/episodes": played,
            }

        try:
            if not state and dev:
                run.log(0, evaluate())
            while played < config.episodes:
                rng, seed = random.Random(f"{config.seed}/{iteration}"), episode_seed(config.seed, iteration)
                games = rng.sample(panel, min(len(panel), config.per_iteration // config.group))
                player = player_of(config.temperature)
                players = play(
                    pool, [g for g in games for _ in range(config.group)], player, config, seed, "hiper"
                )
                found, metrics = traces(players, player, values, config), behaviour(players)
                advantage, targets = advantages(players, found, config)
                turns, shuffled = (
                    [turn for p in players for turn in p.turns],
                    torch.Generator().manual_seed(seed),
                )
                metrics |= fit(values, critic, turns, targets, config, shuffled)
                if iteration >= config.warmup or config.advantage == "group":
                    policy.train()
                    metrics |= improve(
                        policy, reference, actor, turns, advantage, player.encode, config, shuffled
                    )
                iteration, before, played = iteration + 1, played, played + len(players)
                run.log(iteration, metrics | {"play/episodes": played})
                for alarm in watch(metrics):
                    tqdm.write(f"alarm at iteration {iteration}: {alarm}")
                if dev and (
                    before // config.eval_every != played // config.eval_every or played >= config.episodes
                ):
                    run.log(iteration, evaluate())
                run.save_state(
                    iteration, played=played, evals=evals, policy=trainable_state(policy), values=values.state_dict(),
                    actor=actor.state_dict(), critic=critic.state_dict(),
                )  # fmt: skip
                bar.update(len(players))
                bar.set_postfix(
                    success=f"{metrics['play/success']:.0f}", switch=f"{metrics['play/switch_rate']:.2f}"
                )
        except KeyboardInterrupt:
            raise SystemExit(f"stopped after {played} episodes; go on with --resume") from None
    save_policy(policy, config.out, meta | {"stage": "hiper", "steps": iteration})
    print(f"saved {config.out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(error)
