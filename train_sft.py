"""Script: supervised fine-tuning: planner, executor and progress imitate annotated expert episodes.

L_SFT = -E_D[(1/n) sum_i log pi(w_i | s, w_<i)]  (GLIDER, arXiv:2505.19761, eq. 3; 1/n as in STEP-HRL's code)

    python train_sft.py --data out/mine/gold.jsonl --out out/mine/sft
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import prompts
from acting import Policy
from annotate import flat
from batches import Mixture, collate, micro_batches
from data import LEVELS, Episode, Transition, read_episodes, transitions
from logprob import head_weight, sequence_logprobs
from model import (
    PromptFormat,
    add_lora,
    fingerprint,
    hidden_states,
    load_backbone,
    refuse_checkpointing,
    save_policy,
    trainable_state,
)
from plan_execute import TurnBatch, by_length, expert_turns
from plan_execute import collate as collate_turns
from renaming import OtherNames
from run import (
    Precision,
    Run,
    fail,
    fast_precision,
    forward_tokens,
    gather,
    own_share,
    pick_device,
    sum_gradients,
    sum_over_processes,
)


@dataclass(frozen=True)
class Config:
    data: Path  # annotated expert episodes (JSONL from collect.py)
    out: Path  # run folder
    model: str = "base"  # backbone: "base", a folder or a hub id
    prompt: PromptFormat = "raw"  # chat: each prompt as a user's message in the chat template of --model
    history: Literal["progress", "full", "window"] = "progress"  # what a decision is conditioned on
    flat: bool = False  # no planner: one subtask per episode, the task itself
    plan_execute: bool = False  # HiPER's format instead of three roles: keep or switch the subgoal, then act
    adapters: Literal["shared", "separate"] = "shared"  # one adapter for all roles, or one each
    rank: int = 16  # LoRA rank; 0 trains all weights: a small model (`base`) learns faster so, at --lr 1e-3
    targets: Literal["all", "attention"] = "all"  # linear layers that get LoRA; the papers use attention only
    epochs: float = 3.0  # decisions drawn, in units of those of --data; 0 saves the untrained adapter
    shares: tuple[float, float, float] = (3.0, 2.0, 1.0)  # of planner, executor and progress in what is drawn
    practice: tuple[Path, ...] = ()  # what collect.py --source stumble and practice made: learned from too
    rename: float = 0.0  # probability that a decision is shown under other names of what its prompt names
    batch_size: int = 16  # decisions per step
    lr: float = 2e-3  # peak AdamW step size, decayed linearly to a tenth (papers: 1e-4 for 7-8B)
    tokens_per_forward: int = field(default_factory=forward_tokens)  # padded tokens of a micro-batch
    precision: Precision = field(default_factory=fast_precision)  # of products; on CPU weights are fp32
    compile: bool = False  # compiled layers, faster after a minute or two; on CPU needs a C++ compiler
    gradient_checkpointing: bool = False  # less memory, more time
    save_every: int = 100  # steps between states for --resume
    seed: int = 0
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"
    resume: bool = False  # go on with an interrupted run


def hindsight(episode: Episode, history: str, is_flat: bool = False) -> list[Transition]:
    """What practice teaches: exploration how to do things, stumbles what to do next, both to report failures.

    Whatever was done is a good example of how to do just that (HER, arXiv:1707.01495), if room or inventory
    changed by it, which only a focus need not: else a subtask would seem done where one stands. From a gold
    path with slips the planner learns what the expert goes on with, the executor what it does after a
    refusal, and neither the slips. A progress policy that saw successes alone would report them always.
    A flat agent, which has no subtasks to practise, learns from stumbles alone.
    """
    if episode.source.startswith("stumble"):
        done = [s for s in episode.segments if episode.turns[s.end - 1].verified_done]
        learned = {("planner", s.start) for s in done} | {
            ("executor", t) for s in done for t in range(s.start, s.end)
            if prompts.refused(episode.turns[t].obs) and not prompts.refused(episode.obs_after(t))
        }  # fmt: skip
        found = transitions(flat(episode) if is_flat else episode, history, flat=is_flat)
        return [t for t in found if t.level == "progress" or (t.level, t.turn) in learned]
    if is_flat:
        raise ValueError("--practice shows subtasks, of which a flat agent has none: give it stumbles alone")
    kept = set()
    for s in episode.segments:
        before, after = (
            prompts.split_obs(obs)[1:] for obs in (episode.turns[s.start].obs, episode.obs_after(s.end - 1))
        )
        changed = before != after or s.subtask.startswith("focus on ")
        if episode.turns[s.end - 1].verified_done and changed:
            kept |= set(range(s.start, s.end))
    found = transitions(episode, history)
    return [t for t in found if t.level == "progress" or (t.level == "executor" and t.turn in kept)]


def by_level_and_task(decisions: list[Transition], shares: tuple[float, float, float]) -> tuple[dict, dict]:
    """Pools and ratios for a Mixture: levels at `shares`, and within a level episodes of all types alike.

    As GLIDER, which resamples every type to as many episodes: else types with few variations are hardly seen,
    while a type with long plans has as many more decisions to learn. Exploration, which solves no task, is
    drawn as often as all types together, or what holds in a few tasks alone would be learned as the rule;
    stumbles belong to the type whose path they are in.
    """
    pools = {}
    for decision in decisions:
        explored = decision.source.startswith("practice")
        task = "practice" if explored else decision.episode_id.split("/")[1]
        pools.setdefault(f"{decision.level}/{task}", []).append(decision)
    ratios = {}
    for level, share in zip(LEVELS, shares, strict=True):
        own = {name: pool for name, pool in pools.items() if name.startswith(f"{level}/")}
        parts = {name: len(pool) / len({t.episode_id for t in pool}) for name, pool in own.items()}
        if (practice := f"{level}/practice") in parts:
            parts[practice] = sum(part for name, part in parts.items() if name != practice) or 1
        ratios |= {name: share * part / sum(parts.values()) for name, part in parts.items()}
    return pools, ratios


def sft_loss(policy, batch, count: int, hidden_fn=hidden_states) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over decisions of the mean token loss / the global count, and log pi of each answer (B,).

    Padding and prompts carry no loss.
    """
    hidden = hidden_fn(policy, batch.input_ids, batch.level)  # (B, T, D)
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    _, sums = sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)  # (B,)
    return -(sums / batch.action_mask.sum(1)).sum() / count, sums.detach()


def turn_loss(
    policy, batch: TurnBatch, count: int, hidden_fn=hidden_states
) -> tuple[torch.Tensor, torch.Tensor]:
    """sft_loss of plan-execute turns: what the host inserts carries no loss."""
    hidden = hidden_fn(policy, batch.input_ids, torch.zeros(len(batch.part)))  # (B, T, D)
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    decided = batch.part > 0
    _, sums = sequence_logprobs(hidden, weight, batch.input_ids, decided, bias=bias)  # (B,)
    return -(sums / decided.sum(1)).sum() / count, sums.detach()


def said(answers: list[tuple[str, float]]) -> dict[str, float]:
    """(level, log pi of the expert's answer) -> level/said: its mean probability."""
    by_level = {}
    for level, logp in sorted(answers):
        by_level.setdefault(f"{level}/said", []).append(math.exp(logp))
    return {name: fmean(probabilities) for name, probabilities in by_level.items()}


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.gradient_checkpointing:
        refuse_checkpointing(config.adapters)
    if config.plan_execute and (config.adapters != "shared" or config.flat or config.history != "progress"):
        raise ValueError("--plan-execute is one policy: leave out --adapters separate, --flat and --history")
    if config.plan_execute and (config.rename or config.practice):
        raise ValueError("--rename and --practice know three roles: leave them out with --plan-execute")
    device = pick_device(config.device)
    lm, tokenizer = load_backbone(config.model, device, config.gradient_checkpointing, config.prompt)
    if config.rank == 0:
        lm = lm.float()  # small steps would be rounded away in bf16 weights
    base = fingerprint(lm, tokenizer)
    episodes = read_episodes(config.data)
    if config.plan_execute:
        pools, encode = {}, Policy(None, tokenizer).encode
        for e in episodes:
            pools.setdefault(e.task, []).extend(expert_turns(e, tokenizer))
        count, counts = sum(map(len, pools.values())), {task: len(turns) for task, turns in pools.items()}
        sampler = Mixture(pools, dict.fromkeys(pools, 1.0), config.seed)
    else:
        decisions: list[Transition] = [
            t
            for e in episodes
            for t in transitions(flat(e) if config.flat else e, config.history, flat=config.flat)
        ]
        count, counts = len(decisions), Counter(t.level for t in decisions)
        practised = [e for path in config.practice for e in read_episodes(path)]
        decisions += [t for e in practised for t in hindsight(e, config.history, config.flat)]
        sampler = Mixture(*by_level_and_task(decisions, config.shares), config.seed)
        episodes += practised

    other_names = OtherNames(episodes, tokenizer, config.rename)
    hidden_fn = functools.partial(hidden_states, precision=config.precision, compile=config.compile)

    def losses(items: list) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
        """A batch in parts, one forward each: levels of the answers, loss, log pi."""
        if config.plan_execute:
            for group in own_share(by_length(items, encode, config.tokens_per_forward)):
                batch = collate_turns([items[i] for i in group], encode).to(device)
                yield ["turn"] * len(group), *turn_loss(policy, batch, len(items), hidden_fn)
        else:
            for part in own_share(micro_batches(items, tokenizer, config.tokens_per_forward)):
                batch = collate(part, tokenizer).to(device)
                yield [t.level for t in part], *sft_loss(policy, batch, len(items), hidden_fn)

    run = Run(
        config.out, config, config.resume
    )  # seeds; after the inputs are read, so a wrong path leaves no folder
    policy = add_lora(lm, config.rank, config.targets, config.adapters).train()
    steps = round(config.epochs * count / config.batch_size) or int(config.epochs > 0)
    if run.writes:
        print(f"{count} decisions {dict(counts)}, {steps} steps on {device}")

    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    start = 0
    if state := run.load_state():
        policy.load_state_dict(state["policy"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        start = state["step"]

    def save(step: int) -> None:
        run.save_state(
            step,
            policy=trainable_state(policy),
            optimizer=optimizer.state_dict(),
            sampler=sampler.state_dict(),
        )

    bar = tqdm(range(start, steps), initial=start, total=steps, desc="sft", disable=not run.writes)
    began, step = time.time(), start
    try:
        for step in bar:
            rate = min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)  # short warm-up, linear decay
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate
            items, loss, answers = sampler.batch(config.batch_size), 0.0, []
            if config.rename:
                items = other_names(items, f"{config.seed}/{step}")
            for levels, partial, logp in losses(items):
                partial.backward()
                loss += partial.item()
                answers += zip(levels, logp.tolist(), strict=True)
            loss = sum_over_processes(loss)
            sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True).item()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{loss:.3f}")
                metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.lr * rate}
                run.log(step + 1, metrics | said(gather(answers)))
            if (step + 1) % config.save_every == 0:
                save(step + 1)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped at step {step}; go on with --resume") from None
    save(steps)
    meta = {
        "model": config.model, "base": base, "rank": config.rank, "adapters": config.adapters,
        "prompt": config.prompt, "history": config.history, "flat": config.flat, "stage": "sft",
        "steps": steps, "format": "plan-execute" if config.plan_execute else "roles",
    }  # fmt: skip
    if run.writes:
        save_policy(policy, config.out, meta)
        print(f"saved {config.out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
