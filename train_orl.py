"""Script: offline RL on fixed expert episodes and rollouts (GLIDER, arXiv:2505.19761, Algorithm 1).

    python train_orl.py --init out/mine/sft --expert out/mine/gold.jsonl \
        --rollouts out/mine/rollouts.jsonl --out out/mine/orl

Starts from the SFT adapter. The gradient step itself (IQL critic, AWR actor) is learner.py.
"""

import functools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from acting import Policy, Request
from annotate import decisions_of
from batches import Mixture, collate, micro_batches
from critic import Critics, save_critics
from data import Credit, Transition, read_episodes
from diagnostics import Watch
from hierarchy import MAX_NEW_TOKENS, episode_seed
from learner import Learner
from model import (
    add_lora,
    fingerprint,
    hidden_states,
    lm_of,
    load_policy,
    refuse_format,
    save_policy,
    trainable_state,
)
from readings import PRESETS, RLConfig
from renaming import OtherNames
from run import Precision, Run, fail, fast_precision, forward_tokens, gather, own_share, pick_device


@dataclass(frozen=True)
class Config:
    init: Path  # checkpoint to start from (train_sft.py)
    expert: Path  # annotated expert episodes
    rollouts: Path  # episodes sampled by the SFT policy, rewarded by the judge
    out: Path  # run folder
    preset: Literal["none", *PRESETS] = "none"  # readings that go together: a paper as printed, or its code
    rl: RLConfig = field(default_factory=RLConfig)  # the gradient step
    credit: Credit = field(default_factory=Credit)  # rewards of executor and progress
    rank: int = 16  # of LoRA where SFT trained all weights, which then stay; 0 trains them on
    rename: float = 0.0  # probability that an expert's decision is shown under other names (train_sft.py)
    expert_share: float = 1.0  # expert : rollout ratio, first number (papers: 1)
    rollout_share: float = 2.0  # expert : rollout ratio, second number (papers: 2)
    steps: int = 120  # gradient steps
    warmup_steps: int = 50  # first steps train the critics only (STEP-HRL: 100 of its smaller steps)
    batch_size: int = 64  # decisions per step
    tokens_per_forward: int = field(default_factory=forward_tokens)  # padded tokens of a micro-batch
    precision: Precision = field(default_factory=fast_precision)  # of products; on CPU weights are fp32
    compile: bool = False  # compiled layers, faster after a minute or two; on CPU needs a C++ compiler
    gradient_checkpointing: bool = False  # less memory, more time
    save_every: int = 50  # steps between states for --resume
    seed: int = 0
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


def with_preset(config: Config) -> Config:
    """The config with the readings of its preset; another value of theirs than the default is refused."""
    if config.preset == "none":
        return config
    groups = {}
    for group, readings in PRESETS[config.preset].items():
        given, default = getattr(config, group), type(getattr(config, group))()
        if clash := [n for n, v in readings.items() if getattr(given, n) not in (v, getattr(default, n))]:
            raise ValueError(f"--preset {config.preset} sets {group} {clash}: leave out these flags or it")
        groups[group] = replace(given, **readings)
    return replace(config, **groups)


def sample_answers(policy, tokenizer, items: list[Transition], seed: int) -> dict[int, list[int]]:
    """id(decision) -> answer ids that the policy samples for its prompt now, at temperature 1.

    A decision drawn twice in a batch has one answer.
    """
    policy.eval()  # in training, gradient checkpointing would drop the key-value cache
    player = Policy(policy, tokenizer, temperature=1.0, planning_ratio=1.0)
    requests = [
        Request(t.level, t.prompt, MAX_NEW_TOKENS[t.level], episode_seed(seed, i))
        for i, t in enumerate(items)
    ]
    mine = own_share(list(range(len(items))))
    answers = player.answer([requests[i] for i in mine])
    ids = dict(gather([(i, answer.ids) for i, answer in zip(mine, answers, strict=True)]))
    policy.train()
    return {id(t): ids[i] for i, t in enumerate(items)}


def main(config: Config) -> None:
    config = with_preset(config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = pick_device(config.device)
    policy, tokenizer, meta = load_policy(config.init, device, True, config.gradient_checkpointing)
    refuse_format(config.init, meta, "roles")
    episodes = {name: read_episodes(getattr(config, name)) for name in ("expert", "rollouts")}
    other_names = OtherNames(episodes["expert"], tokenizer, config.rename)
    pools = {name: decisions_of(found, meta, config.credit, config.rl) for name, found in episodes.items()}
    shares = {"expert": config.expert_share, "rollouts": config.rollout_share}
    sampler = Mixture(pools, {name: share for name, share in shares.items() if share > 0}, config.seed)
    run = Run(
        config.out, config, config.resume
    )  # seeds; after the inputs are read, so a wrong path leaves no folder
    if meta["rank"] == 0 and config.rank:  # what SFT taught to all weights is the backbone from here on
        backbone, base = config.out / "backbone", fingerprint(policy, tokenizer)
        if run.writes:
            policy.save_pretrained(backbone)
            tokenizer.save_pretrained(backbone)
        meta |= {"model": str(backbone), "base": base, "rank": config.rank}
        policy = add_lora(policy, config.rank).train()
    if run.writes:
        print({name: len(pool) for name, pool in pools.items()})
    critics = Critics(lm_of(policy).config.hidden_size).to(device)
    hidden_fn = functools.partial(hidden_states, precision=config.precision, compile=config.compile)
    learner = Learner(policy, critics, hidden_fn, config.rl)
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

    watch = Watch()
    steps = range(start, config.steps)
    bar = tqdm(steps, initial=start, total=config.steps, desc="orl", disable=not run.writes)
    began, step = time.time(), start
    try:
        for step in bar:
            items, answers = other_names(sampler.batch(config.batch_size), f"{config.seed}/{step}"), None
            if config.rl.samples_answers:
                answers = sample_answers(policy, tokenizer, items, episode_seed(config.seed, step))
            batches = [
                collate(part, tokenizer, config.rl.bootstrap == "next_q", answers).to(device)
                for part in own_share(micro_batches(items, tokenizer, config.tokens_per_forward, answers))
            ]
            metrics = learner.update(batches, train_actor=step >= config.warmup_steps)  # V, Q, policy, target
            run.log(step + 1, metrics)
            for alarm in watch(metrics) if run.writes else ():
                tqdm.write(f"alarm at step {step + 1}: {alarm}")
            bar.set_postfix(
                {k: f"{metrics[k]:.3f}" for k in ("executor/q_loss", "executor/actor_loss") if k in metrics}
            )
            if (step + 1) % config.save_every == 0:
                save(step + 1)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped at step {step}; go on with --resume") from None
    save(config.steps)
    if run.writes:
        meta |= {"stage": "orl", "steps": config.steps, "features": config.rl.features}
        save_policy(policy, config.out, meta)
        save_critics(critics, config.out / "critic.safetensors")
        print(f"saved {config.out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
