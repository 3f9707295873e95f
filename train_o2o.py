"""Script: offline to online: offline RL's update, also on fresh episodes (GLIDER, arXiv:2505.19761, 3.5).

    python train_o2o.py --init out/mine/orl --offline out/mine/gold.jsonl out/mine/rollouts.jsonl \
        --panel demo --out out/mine/o2o

In rounds: the policy plays train variations, its last episodes become the online buffer, and batches of
offline and online decisions train it, at a step size that falls to 0. The planner adapts; what happens to the
executor is --frozen, and how far its log-probs drift on a sample of the expert's decisions is logged. Writes
evals.json, the scores of all evaluations, and online.jsonl, the episodes.
"""

import functools
import json
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

import annotate
from acting import Policy
from batches import Mixture, collate, micro_batches
from critic import load_critics, save_critics
from data import Credit, Episode, Transition, read_episodes, write_episodes
from diagnostics import Watch
from envs import EnvName, EnvPool, read_panel
from hierarchy import Curious, Ends, episode_seed, rollout
from learner import Learner
from logprob import head_weight, sequence_logprobs
from model import (
    ROLES,
    SHARED,
    hidden_states,
    is_separate,
    lm_of,
    load_policy,
    refuse_format,
    save_policy,
    trainable_state,
)
from readings import RLConfig
from renaming import OtherNames
from run import Precision, Run, fail, fast_precision, forward_tokens, pick_device
from scores import macro_mean


@dataclass(frozen=True)
class Config:
    init: Path  # checkpoint to start from (train_orl.py)
    offline: tuple[Path, ...]  # annotated episodes; those of an expert are also what the drift is measured on
    out: Path  # run folder
    env: EnvName = "scienceworld"  # which text world
    panel: str = "demo"  # played from its train split
    dev: str = "dev"  # split on which it is evaluated, greedily; "" never
    dev_limit: int = 5  # of it the first so many of each task
    limit: int = 0  # of train the first so many of each task; 0 is all
    # adapter: roles get adapters of their own and only the planner's is trained (a true freeze); replay: one
    # adapter, whose lower levels go on imitating the expert (the paper's appendix); nothing: all is trained
    frozen: Literal["adapter", "replay", "nothing"] = "adapter"
    rl: RLConfig = field(default_factory=RLConfig)  # the gradient step
    credit: Credit = field(default_factory=Credit)  # rewards of executor and progress
    rename: float = 0.0  # probability that an offline decision of the expert's is shown under other names
    env_steps: int = 10_000  # environment steps to play in all
    episodes: int = 16  # played per round
    buffer: int = 64  # last online episodes that are trained on (GLIDER's code: 32)
    updates: float = 1.0  # gradient steps per new episode
    offline_share: float = 1.0  # offline : online ratio of a batch, first number
    online_share: float = 1.0  # offline : online ratio of a batch, second number
    batch_size: int = 64  # decisions per step
    tokens_per_forward: int = field(default_factory=forward_tokens)  # padded tokens of a micro-batch
    precision: Precision = field(default_factory=fast_precision)  # of matrix products, in play too
    compile: bool = False  # compiled layers, faster after a minute or two; on CPU needs a C++ compiler
    temperature: float = 1.0  # of the executor
    planning_ratio: float = 0.7  # planner and progress sample at so much of it
    max_steps: int = 50  # environment steps per episode
    ends: Ends = "claim"  # what ends a subtask in play
    max_actions: int = 0  # cap on the actions of one subtask; 0 is the world's own
    explore: float = 0.0  # probability, falling to 0, that the planner says or begins a plan of the expert's
    give_up: int = 0  # times the same subtask is given before an episode of training is cut off; 0: never
    eval_every: int = 2000  # environment steps between evaluations
    slots: int = 32  # episodes played at once
    workers: int = 2  # simulator processes
    seed: int = 0
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


def split_adapter(policy: nn.Module) -> nn.Module:
    """The shared adapter as three equal ones, one a role: the same policy, whose roles can now part."""
    if is_separate(policy):
        return policy
    if SHARED not in getattr(policy, "peft_config", {}):
        raise ValueError("--frozen adapter needs LoRA: train with --rank above 0, or use --frozen replay")
    weights = {name: p.detach().clone() for name, p in policy.named_parameters() if f".{SHARED}." in name}
    for role in ROLES:
        policy.add_adapter(role, policy.peft_config[SHARED])
        policy.load_state_dict(
            {n.replace(f".{SHARED}.", f".{role}."): p for n, p in weights.items()}, strict=False
        )
    policy.set_adapter(ROLES[0])
    policy.delete_adapter(SHARED)
    return policy


def train_only(policy: nn.Module, role: str) -> None:
    """Leaves the gradient to the adapter of one role."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(f".{role}." in name)


def trained(decisions: list[Transition], config: Config) -> list[Transition]:
    """The decisions that are trained on: the planner's alone where the rest is frozen."""
    return [t for t in decisions if config.frozen != "adapter" or t.level == "planner"]


def without_poor_tries(online: list[Transition]) -> list[Transition]:
    """Online decisions without what exploration said and returned less than the planner's own on average.

    AWR imitates all that it is shown, and would learn to explore. What no policy sampled has no ids; what was
    cut off has no return (nan) and stays.
    """
    own = [t.mc_return for t in online if t.level == "planner" and t.completion_ids]
    usual = fmean([found for found in own if math.isfinite(found)] or [0.0])
    return [t for t in online if t.level != "planner" or t.completion_ids or not t.mc_return < usual]


@torch.no_grad()
def executor_logp(policy: nn.Module, tokenizer, held: list[Transition], config: Config, device: str) -> float:
    """Mean log pi of the expert's executor answers, per decision: it falls when the executor forgets."""
    total, (weight, bias) = 0.0, head_weight(policy.get_output_embeddings(), lm_of(policy).config)
    for part in micro_batches(held, tokenizer, config.tokens_per_forward):
        batch = collate(part, tokenizer).to(device)
        hidden = hidden_states(policy, batch.input_ids, batch.level, config.precision)
        total += (
            sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)[1].sum().item()
        )
    return total / len(held)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = pick_device(config.device)
    policy, tokenizer, meta = load_policy(config.init, device, True)
    refuse_format(config.init, meta, "roles")
    rl, offline = config.rl, [e for path in config.offline for e in read_episodes(path)]
    other_names = OtherNames([e for e in offline if e.source == "expert"], tokenizer, config.rename)
    decisions = annotate.decisions_of(offline, meta, config.credit, rl)
    experts = [t for t in decisions if t.source == "expert" and t.level == "executor"]
    plans = [t.completion.strip() for t in decisions if t.source == "expert" and t.level == "planner"]
    if config.explore and not plans:
        raise ValueError("--explore needs an expert's plans: add the gold episodes to --offline")
    held = random.Random(0).sample(experts, min(256, len(experts)))
    panel = read_panel(config.env, config.panel, "train", config.limit)
    dev = read_panel(config.env, config.panel, config.dev, config.dev_limit) if config.dev else []
    critics = load_critics(config.init / "critic.safetensors", lm_of(policy).config.hidden_size).to(device)
    run = Run(config.out, config, config.resume)
    if config.frozen == "adapter":
        policy = split_adapter(policy)
        train_only(policy, "planner")
    elif config.frozen == "replay":
        rl = replace(config.rl, rl_levels="planner")
    hidden_fn = functools.partial(hidden_states, precision=config.precision, compile=config.compile)
    learner = Learner(policy, critics, hidden_fn, rl)
    played_file, steps, round_, updates, evals = config.out / "online.jsonl", 0, 0, 0, []
    if state := run.load_state():
        policy.load_state_dict(state["policy"], strict=False)
        critics.load_state_dict(state["critics"])
        learner.load_state_dict(state["learner"])
        steps, round_, updates, evals = state["steps"], state["round"], state["step"], state["evals"]
    per_round = min(config.episodes, len(panel))
    played = read_episodes(played_file)[: round_ * per_round] if round_ else []
    write_episodes(played_file, played)  # what a stopped round had played is played again
    watch, began = Watch(), time.time()
    bar = tqdm(total=config.env_steps, initial=steps, unit="step", desc="o2o")

    with EnvPool(config.env, config.slots, config.workers, config.max_steps) as pool:

        def play(episodes: list, temperature: float, seed: int, epsilon=0.0, give_up=0) -> list[Episode]:
            policy.eval()
            player = Policy(policy, tokenizer, temperature, config.planning_ratio, config.precision)
            stream = rollout(
                pool, episodes, player, annotate.rules(config.env).judge, env=config.env,
                history=meta["history"], ends="episode" if meta.get("flat") else config.ends,
                max_actions=annotate.max_actions(config.env, config.max_actions), seed=seed,
                source=f"o2o-{round_}",
                make=lambda _, *usual: Curious(*usual, give_up=give_up, epsilon=epsilon, plans=plans),
            )  # fmt: skip
            found = {(e.task, e.variation): e for e in stream}
            policy.train()
            return [found[episode] for episode in episodes]

        def evaluate() -> dict[str, float]:
            metrics = {"online/env_steps": steps}
            if held:
                metrics["executor/logp_held"] = executor_logp(policy, tokenizer, held, config, device)
            if dev:
                done = play(dev, 0.0, config.seed)
                metrics["dev/score"] = macro_mean([e.task for e in done], [max(0.0, e.score) for e in done])
                metrics["dev/success"] = 100 * sum(e.success for e in done) / len(done)
                row = {"env_steps": steps, "executor_logp": metrics.get("executor/logp_held")}
                evals.append(row | {"panel": dev, "scores": [e.score for e in done]})
                (config.out / "evals.json").write_text(json.dumps({"evals": evals} | run.provenance) + "\n")
            return metrics

        try:
            if not state:
                run.log(0, evaluate())
            while steps < config.env_steps:
                rng = random.Random(f"{config.seed}/{round_}")
                fresh = play(
                    rng.sample(panel, per_round),
                    config.temperature,
                    episode_seed(config.seed, round_),
                    config.explore * (1 - steps / config.env_steps),
                    config.give_up,
                )
                write_episodes(played_file, fresh, append=True)
                played, before, round_ = played + fresh, steps, round_ + 1
                steps += sum(len(e.turns) for e in fresh)
                recent = annotate.decisions_of(played[-config.buffer :], meta, config.credit, rl)
                pools = {
                    "offline": trained(decisions, config),
                    "online": trained(without_poor_tries(recent), config),
                }
                shares = {"offline": config.offline_share, "online": config.online_share}
                sampler = Mixture(pools, shares, episode_seed(config.seed, round_))
                learner.actor_optimizer.param_groups[0]["lr"] = rl.actor_lr * (1 - before / config.env_steps)
                for _ in range(round(config.updates * len(fresh))):
                    items = other_names(sampler.batch(config.batch_size), f"{config.seed}/{updates}")
                    parts = micro_batches(items, tokenizer, config.tokens_per_forward)
                    metrics = learner.update([collate(part, tokenizer).to(device) for part in parts])
                    updates += 1
                    run.log(updates, metrics)
                    for alarm in watch(metrics):
                        tqdm.write(f"alarm at update {updates}: {alarm}")
                score = sum(max(0.0, e.score) for e in fresh) / len(fresh)
                run.log(updates, {"online/score": score, "online/env_steps": steps})
                if before // config.eval_every != steps // config.eval_every or steps >= config.env_steps:
                    run.log(updates, evaluate())
                run.save_state(
                    updates, steps=steps, round=round_, evals=evals, policy=trainable_state(policy),
                    critics=critics.state_dict(), learner=learner.state_dict(),
                )  # fmt: skip
                bar.update(steps - before)
                bar.set_postfix(score=f"{score:.1f}")
        except KeyboardInterrupt:
            raise SystemExit(f"stopped after {steps} environment steps; go on with --resume") from None
    adapters = "separate" if is_separate(policy) else meta["adapters"]
    save_policy(policy, config.out, meta | {"stage": "o2o", "steps": updates, "adapters": adapters})
    save_critics(critics, config.out / "critic.safetensors")
    print(f"saved {config.out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(error)
