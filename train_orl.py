"""Script: offline RL on fixed expert episodes and rollouts (GLIDER, arXiv:2505.19761, Algorithm 1).

    python train_orl.py --init out/demo/sft --expert out/demo/gold.jsonl \
        --rollouts out/demo/rollouts.jsonl --out out/demo/orl

Starts from the SFT adapter. The gradient step itself (IQL critic, AWR actor) is learner.py.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from batches import Mixture, collate, micro_batches
from critic import Critics, save_critics
from data import Transition, read_episodes, transitions
from learner import Learner, RLConfig
from model import hidden_states, lm_of, load_policy, save_policy, trainable_state
from run import Run, fail, pick_device


@dataclass(frozen=True)
class Config:
    init: Path  # checkpoint to start from (train_sft.py)
    expert: Path  # annotated expert episodes
    rollouts: Path  # episodes sampled by the SFT policy, rewarded by the judge
    out: Path  # run folder
    rl: RLConfig = field(default_factory=RLConfig)  # the gradient step
    expert_share: float = 1.0  # expert : rollout ratio, first number (papers: 1)
    rollout_share: float = 2.0  # expert : rollout ratio, second number (papers: 2)
    invalid_penalty: float = (
        1.0  # executor's cost of an action the world does not understand (STEP-HRL; GLIDER 0)
    )
    steps: int = 120  # gradient steps
    warmup_steps: int = 50  # first steps train the critics only (STEP-HRL: 100 of its smaller steps)
    batch_size: int = 64  # decisions per step
    tokens_per_forward: int = 4096  # padded tokens of a micro-batch
    precision: Literal["bf16", "fp32"] = "bf16"  # of the matrix products; weights stay fp32 on CPU
    save_every: int = 50  # steps between states for --resume
    seed: int = 0
    threads: int = 2  # CPU threads
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


def load_decisions(path: Path, history: str, config: Config) -> list[Transition]:
    return [t for e in read_episodes(path) for t in transitions(e, history, config.invalid_penalty)]


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    policy, tokenizer, meta = load_policy(config.init, device, trainable=True)
    pools = {
        name: load_decisions(getattr(config, name), meta["history"], config)
        for name in ("expert", "rollouts")
    }
    print({name: len(pool) for name, pool in pools.items()})
    shares = {"expert": config.expert_share, "rollouts": config.rollout_share}
    sampler = Mixture(pools, {name: share for name, share in shares.items() if share > 0}, config.seed)
    run = Run(
        config.out, config, config.resume
    )  # seeds; after the inputs are read, so a wrong path leaves no folder
    critics = Critics(lm_of(policy).config.hidden_size).to(device)
    learner = Learner(
        policy, critics, lambda m, ids, level: hidden_states(m, ids, level, config.precision), config.rl
    )
    start = 0
    if state := run.load_state():
        policy.load_state_dict(state["policy"], strict=False)
        critics.load_state_dict(state["critics"])
        learner.load_state_dict(state["learner"])
        sampler.load_state_dict(state["sampler"])
        start = state["step"]

    def save(step: int) -> None:
        run.save_state(
            step, policy=trainable_state(policy), critics=critics.state_dict(), learner=learner.state_dict(),
            sampler=sampler.state_dict(),
        )  # fmt: skip

    bar, began, step = (
        tqdm(range(start, config.steps), initial=start, total=config.steps, desc="orl"),
        time.time(),
        start,
    )
    try:
        for step in bar:
            items = sampler.batch(config.batch_size)
            batches = [
                collate(part, tokenizer).to(device)
                for part in micro_batches(items, tokenizer, config.tokens_per_forward)
            ]
            metrics = learner.update(batches, train_actor=step >= config.warmup_steps)  # V, Q, policy, target
            run.log(step + 1, metrics)
            bar.set_postfix(
                {k: f"{metrics[k]:.3f}" for k in ("executor/q_loss", "executor/actor_loss") if k in metrics}
            )
            if (step + 1) % config.save_every == 0:
                save(step + 1)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped at step {step}; go on with --resume") from None
    save(config.steps)
    save_policy(policy, config.out, meta | {"stage": "orl", "steps": config.steps})
    save_critics(critics, config.out / "critic.safetensors")
    print(f"saved {config.out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
