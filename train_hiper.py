"""Script: HiPER, online plan-execute RL with hierarchical advantage estimation (arXiv:2602.16165).

    python train_sft.py --plan-execute --data out/mine/alfworld.jsonl --out out/mine/turns-alfworld
    python train_hiper.py --init out/mine/turns-alfworld --env alfworld --panel demo --out out/mine/hiper

In iterations: play episodes, estimate advantages, fit the values, one pass of clipped policy-gradient steps
(hiper.py). --rl.advantage chooses the estimator on the same format: HiPER's, flat GAE, or the group's.
"""

import functools
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import annotate
from critic import Values
from data import Episode
from diagnostics import Watch
from envs import EnvName, EnvPool, StepResult, read_panel
from hierarchy import Counts, episode_seed, rollout
from hiper import HiperConfig, advantages, behaviour, fit, improve, traces
from model import hidden_states, lm_of, load_policy, refuse_format, save_policy, trainable_state
from plan_execute import PlanExecute, TurnPlayer
from run import Precision, Run, fail, fast_precision, forward_tokens, pick_device
from scores import macro_mean


@dataclass(frozen=True)
class Config:
    init: Path  # plan-execute checkpoint to start from, and to stay near to (train_sft.py --plan-execute)
    out: Path  # run folder
    env: EnvName = "alfworld"  # which text world
    panel: str = "demo"  # played from its train split
    dev: str = "valid_seen"  # split on which it is evaluated, greedily; "" never
    dev_limit: int = 0  # of it the first so many of each task; 0 is all
    rl: HiperConfig = field(default_factory=HiperConfig)  # the update
    episodes: int = 2000  # episodes to play in all
    per_iteration: int = 64  # of them per iteration
    group: int = 8  # plays of the same game in an iteration (GRPO's group; the others play alike)
    warmup: int = 2  # first iterations that fit the values only (none without a critic)
    max_steps: int = 30  # environment steps per episode of training
    max_misses: int = 4  # actions in a row not understood that end a training episode as a limit; 0: never
    dev_steps: int = 50  # and of evaluation
    tokens_per_forward: int = field(default_factory=forward_tokens)  # padded tokens of a micro-batch
    precision: Precision = field(default_factory=fast_precision)  # of matrix products, in play too
    compile: bool = False  # compiled layers, faster after a minute or two; on CPU needs a C++ compiler
    eval_every: int = 1000  # episodes between evaluations
    slots: int = 64  # episodes played at once
    workers: int = 0  # simulator processes; 0 is right for ALFWorld, ScienceWorld is faster with 2
    seed: int = 0
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


def play(
    pool: EnvPool, panel: list, policy: PlanExecute, config: Config, seed: int, max_misses: int = 0
) -> list[TurnPlayer]:
    """The players of all episodes of `panel`, which may repeat a game, in its order."""
    players, judge = {}, annotate.rules(config.env).judge

    def make(place: int, episode: Episode, first: StepResult, *_) -> TurnPlayer:
        players[place] = TurnPlayer(episode, first, episode_seed(seed, place), judge, max_misses)
        return players[place]

    for _ in rollout(pool, panel, policy, judge, env=config.env, source="hiper", counts=Counts(), make=make):
        pass
    return [players[place] for place in range(len(panel))]


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = pick_device(config.device)
    policy, tokenizer, meta = load_policy(config.init, device, True)
    refuse_format(config.init, meta, "plan-execute")
    if config.per_iteration % config.group:
        raise ValueError(f"--per-iteration is no multiple of --group {config.group}: {config.per_iteration}")
    reference, _, _ = load_policy(config.init, device)
    panel = read_panel(config.env, config.panel, "train")
    dev = read_panel(config.env, config.panel, config.dev, config.dev_limit) if config.dev else []
    run = Run(config.out, config, config.resume)
    values = Values(lm_of(policy).config.hidden_size).to(device)
    actor = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=config.rl.lr)
    critic = torch.optim.AdamW(values.parameters(), lr=config.rl.value_lr)
    hidden_fn = functools.partial(hidden_states, precision=config.precision, compile=config.compile)
    played, iteration, evals = 0, 0, []
    if state := run.load_state():
        policy.load_state_dict(state["policy"], strict=False)
        values.load_state_dict(state["values"])
        actor.load_state_dict(state["actor"])
        critic.load_state_dict(state["critic"])
        iteration, played, evals = state["step"], state["played"], state["evals"]
    watch, began = Watch(every=5), time.time()
    bar = tqdm(total=config.episodes, initial=played, unit="episode", desc="hiper")

    def evaluate() -> dict[str, float]:
        player = PlanExecute(policy, tokenizer, precision=config.precision)
        with EnvPool(config.env, config.slots, config.workers, config.dev_steps) as pool:
            done = play(pool, dev, player, config, config.seed)
        scores = [max(0.0, p.now.score) for p in done]
        evals.append({"episodes": played, "panel": dev, "scores": scores})
        (config.out / "evals.json").write_text(json.dumps({"evals": evals} | run.provenance) + "\n")
        success = 100 * sum(p.now.success for p in done) / len(done)
        score = macro_mean([p.episode.task for p in done], scores)
        return {"dev/score": score, "dev/success": success, "dev/episodes": played}

    try:
        if dev and not state:
            run.log(0, evaluate())
        with EnvPool(config.env, config.slots, config.workers, config.max_steps) as pool:
            while played < config.episodes:
                seed = episode_seed(config.seed, iteration)
                games = random.Random(seed).sample(panel, config.per_iteration // config.group)
                rng = torch.Generator().manual_seed(seed)
                player = PlanExecute(
                    policy.eval(), tokenizer, config.rl.temperature, precision=config.precision
                )
                repeated = [game for game in games for _ in range(config.group)]
                players = play(pool, repeated, player, config, seed, config.max_misses)
                turns = [turn for p in players for turn in p.turns]
                found = traces(players, player, values, config.rl)
                advantage, targets = advantages(players, found, config.rl)
                metrics = behaviour(players) | fit(values, critic, turns, targets, config.rl, rng)
                actor.param_groups[0]["lr"] = config.rl.lr * (1 - played / config.episodes)
                if iteration >= config.warmup or config.rl.advantage == "group":
                    metrics |= improve(
                        policy.train(), reference, hidden_fn, actor, turns, advantage, player.encode,
                        config.tokens_per_forward, config.rl, rng,
                    )  # fmt: skip
                iteration, before, played = iteration + 1, played, played + len(players)
                run.log(iteration, metrics | {"play/episodes": played})
                for alarm in watch(metrics):
                    tqdm.write(f"alarm at iteration {iteration}: {alarm}")
                last = played >= config.episodes
                if dev and (last or before // config.eval_every != played // config.eval_every):
                    run.log(iteration, evaluate())
                run.save_state(
                    iteration, played=played, evals=evals, policy=trainable_state(policy),
                    values=values.state_dict(), actor=actor.state_dict(), critic=critic.state_dict(),
                )  # fmt: skip
                bar.update(len(players))
                bar.set_postfix(
                    success=f"{metrics['play/success']:.0f}", turns=f"{metrics['play/turns']:.1f}"
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
