"""Script: plays a panel greedily and writes one results JSON and the episodes.

    python eval.py --checkpoint out/mine/sft --panel demo --split dev --out out/mine --name sft
    python eval.py --agent random --panel glider --split dev --out out/mine --name random
    python eval.py --checkpoint out/mine/orl --watch        # one episode, here; --seed picks which
    python eval.py --check                                  # does this machine have what is needed?

Nothing is selected on test: every evaluation of a test split is recorded in results/test_log.jsonl with its
reason.
"""

import functools
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import annotate
import completion
import scores
import scripted
from acting import Answer, Policy, Request
from candidates import BestOfK
from check import check
from critic import load_critics
from data import Episode, transitions, write_episodes
from envs import EnvName, EnvPool, StepResult, read_panel
from hierarchy import Counts, Ends, Guided, Player, rollout
from model import PromptFormat, file_hash, fingerprint, lm_of, load_backbone, load_policy
from plan_execute import PlanExecute, TurnPlayer
from run import fail, pick_device, provenance
from watch import Watched

RESULTS = Path(__file__).parent / "results"
POLICIES = Path(__file__).parent / "policies"  # what ships, a folder per world (recipes/ship.py)
HELD_OUT = ("test", "valid_unseen")  # every evaluation of these is recorded


@dataclass(frozen=True)
class Config:
    out: Path = Path("out/eval")  # folder: writes <out>/results/<name>.json and <out>/episodes/<name>.jsonl
    name: str = ""  # of the row; by default that of the checkpoint's folder, or the agent's
    watch: bool = False  # play one episode of the panel in the terminal and write nothing; --seed picks it
    check: bool = False  # only say whether this machine has what is needed, and how to mend it
    # who plays; zero-shot: the backbone without an adapter
    agent: Literal["policy", "zero-shot", "random", "gold", "oracle"] = "policy"
    checkpoint: Path | None = None  # policy folder, for --agent policy; None: what ships in policies/<env>
    model: str = "base"  # backbone, for --agent zero-shot
    prompt: PromptFormat = "raw"  # of --agent zero-shot; a checkpoint knows its own
    env: EnvName = "scienceworld"  # which text world; alfworld is the fast engine
    panel: str = "demo"  # panels/<env>_<panel>_<split>.txt
    split: Literal["dev", "test", "valid_seen", "valid_unseen"] = "dev"  # ALFWorld has the last two
    limit: int = 0  # at most this many episodes of a task type; 0 is all
    max_steps: int = 50  # environment steps per episode
    ends: Ends = "claim"  # what ends a subtask; a flat policy has none
    max_actions: int = 0  # cap on the actions of one subtask (--ends cap: its length); 0 is the world's own
    temperature: float = 0.0  # 0 is greedy
    # an expert's gold path in place of this level: which one is the bottleneck?
    guide: Literal["none", "planner", "executor"] = "none"
    candidates: int = 1  # above 1: the greedy answer and others sampled compete, the highest Q(s,a) acts
    seed: int = 0  # of sampling and of the random agent
    slots: int = 40  # episodes played at once
    workers: int = 2  # simulator processes
    threads: int = 0  # CPU threads of the policy; 0 leaves it to torch: all cores
    device: str = "auto"
    reason: str = ""  # why a test split is evaluated; required for it


def benchmark(env: str, panel: list) -> str:
    """What the scores are scores of: generated ALFWorld games are not the official ones."""
    if env == "scienceworld":
        return env
    made = {"generated" if "/generated_" in game else "official" for _, game in panel}
    return f"alfworld, {' and '.join(sorted(made))} games"


def ends_of(config: Config, meta: dict) -> Ends:
    return "episode" if meta.get("flat") or meta.get("format") == "plan-execute" else config.ends


def expert_episodes(config: Config, panel: list) -> list[Episode]:
    """The annotated gold paths of the panel, in its order; for --guide."""
    with EnvPool(config.env, config.slots, config.workers, 10**6) as pool:
        stream = scripted.play_gold(pool, panel, config.env)
        played = {(e.task, e.variation): annotate.annotate(e) for e in tqdm(stream, total=len(panel))}
    return [played[episode] for episode in panel]


def best_of(model, tokenizer, config: Config) -> BestOfK:
    """The policy with the critics of its checkpoint."""
    critics = load_critics(config.checkpoint / "critic.safetensors", lm_of(model).config.hidden_size)
    return BestOfK(model, tokenizer, critics.to(next(model.parameters()).device), config.candidates)


def play(config: Config, panel: list, pool: EnvPool, counts: Counts) -> tuple[list[Episode], dict]:
    """The episodes of the panel in its order, and what is known of the agent."""
    meta, judge = {"stage": config.agent, "history": "progress"}, annotate.rules(config.env).judge

    def make(place: int, episode: Episode, first: StepResult, *usual) -> Player:
        if meta.get("format") == "plan-execute":
            return TurnPlayer(episode, first, config.seed, judge)
        if config.watch:
            return Watched(episode, first, *usual, value=value)
        kind = functools.partial(Guided, expert=experts[place], guide=config.guide) if experts else Player
        return kind(episode, first, *usual)

    experts = expert_episodes(config, panel) if config.guide != "none" else []
    value = None  # Q of (request, answer), with critics
    if config.agent == "random":
        stream = scripted.play_random(pool, panel, config.env, config.seed)
    elif config.agent in ("gold", "oracle"):
        stream = scripted.play_gold(pool, panel, config.env, config.agent)
    else:
        device = pick_device(config.device)
        if config.agent == "policy":
            model, tokenizer, meta = load_policy(config.checkpoint, device)
            if config.candidates > 1 and meta.get("features") == "frozen":
                raise ValueError("these critics read features without the adapter: leave out --candidates")
            if config.watch and meta.get("format") == "plan-execute":
                raise ValueError("--watch shows planner, executor and progress: this policy has one role")
            trained = (config.checkpoint / "critic.safetensors").exists()
            if trained and meta.get("features") != "frozen" and meta.get("format") != "plan-execute":
                scorer = best_of(model, tokenizer, config)
                value = lambda request, answer: scorer.values(request, [answer]).item()  # noqa: E731
        else:
            model, tokenizer = load_backbone(config.model, device, prompt=config.prompt)
            meta |= {"model": config.model, "base": fingerprint(model, tokenizer)}
        kind = PlanExecute if meta.get("format") == "plan-execute" else Policy
        policy = kind(model.eval(), tokenizer, config.temperature)
        if config.candidates > 1:
            policy = best_of(model, tokenizer, config)
        stream = rollout(
            pool, panel, policy, judge, env=config.env,
            history=meta["history"], ends=ends_of(config, meta),
            max_actions=annotate.max_actions(config.env, config.max_actions),
            seed=config.seed, source=meta["stage"], counts=counts, make=make,
        )  # fmt: skip
    bar = tqdm(stream, total=len(panel), desc=config.name, disable=config.watch)
    played = {(e.task, e.variation): e for e in bar}
    episodes = [played[episode] for episode in panel]
    if value and not config.watch:
        for first in {e.task: e for e in reversed(episodes)}.values():  # what plot.py shows
            note_values(first, meta, value)
    return episodes, meta


def note_values(episode: Episode, meta: dict, value: Callable[[Request, Answer], float]) -> None:
    """Sets Decision.value of the decisions of an episode; an expert's (--guide) have no tokens, so none."""
    asked = {(t.level, t.turn): t.prompt for t in transitions(episode, meta["history"], flat=meta["flat"])}
    for d in episode.decisions:
        if d.ids and (prompt := asked.get((d.level, d.turn))):
            d.value = round(value(Request(d.level, prompt, 0, 0), Answer("", d.ids, d.logprobs, 0)), 3)


def main(config: Config) -> dict:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.check:
        raise SystemExit(not check())
    if config.agent == "policy" and config.checkpoint is None and (POLICIES / config.env).exists():
        config = replace(config, checkpoint=Path(os.path.relpath(POLICIES / config.env)))
    usual = (config.checkpoint or Path(config.agent)).name
    usual += f"-guide-{config.guide}" if config.guide != "none" else ""
    usual += f"-best-of-{config.candidates}" if config.candidates > 1 else ""
    config = replace(config, name=config.name or usual)
    if config.agent == "policy" and config.checkpoint is None:
        raise ValueError("--agent policy needs --checkpoint FOLDER: train one with train_sft.py")
    if config.split in HELD_OUT and not config.reason:
        raise ValueError("a test split is reported once: say --reason '...'; choose on dev or valid_seen")
    if config.candidates > 1 and (config.agent != "policy" or config.temperature):
        raise ValueError("--candidates needs --agent policy, and --temperature 0: it samples at 1 by itself")
    if config.guide != "none" and config.agent != "policy":
        raise ValueError("--guide replaces one level of a policy: it needs --agent policy")
    if config.watch and config.agent not in ("policy", "zero-shot"):
        raise ValueError("--watch shows a model at play: leave out --agent, or use --agent zero-shot")
    if config.watch and (config.split in HELD_OUT or config.guide != "none"):
        raise ValueError("--watch plays a policy alone on dev or valid_seen: leave out --guide, test splits")
    panel = read_panel(config.env, config.panel, config.split, config.limit)
    panel = [random.Random(config.seed).choice(panel)] if config.watch else panel
    counts, began = Counts(), time.time()
    with EnvPool(config.env, config.slots, config.workers, config.max_steps) as pool:
        episodes, meta = play(config, panel, pool, counts)
    if config.watch:
        return {"scores": [e.score for e in episodes]}
    steps = sum(len(e.turns) for e in episodes)
    tokens = {
        role: {
            "prompt": round(counts.prompt_tokens[role] / n, 1),
            "completion": round(counts.completion_tokens[role] / n, 1),
        }
        for role, n in counts.decisions.items()
        if n
    }
    result = {
        "benchmark": benchmark(config.env, panel), "panel": config.panel, "split": config.split,
        "agent": config.name, "stage": meta["stage"],
        "checkpoint": str(config.checkpoint or meta.get("base", "")),
        "guide": config.guide, "candidates": config.candidates,
        "seeds": [config.seed], "limit": config.limit, "max_steps": config.max_steps,
        **scores.summary(
            [e.task for e in episodes], [e.score for e in episodes], [e.success for e in episodes]
        ),
        "tokens_per_decision": tokens,
        "tokens_per_step": round(
            (sum(counts.prompt_tokens.values()) + sum(counts.completion_tokens.values())) / steps, 1
        ),
        "parse_failure_rate": round(counts.parse_failures / max(1, counts.decisions["executor"]), 4),
        "max_actions": annotate.max_actions(config.env, config.max_actions),
        "subtasks": completion.summary(episodes, ends_of(config, meta)),
        "mean_steps": round(steps / len(episodes), 1),
        "scores": [e.score for e in episodes], "minutes": round((time.time() - began) / 60, 2),
        **provenance(),
    }  # fmt: skip
    write_episodes(config.out / "episodes" / f"{config.name}.jsonl", episodes)
    path = config.out / "results" / f"{config.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if config.split in HELD_OUT:
        adapter = file_hash(config.checkpoint / "adapter") if config.checkpoint else meta.get("base", "")
        record = {k: result[k] for k in ("panel", "agent", "macro_mean", "ci95", "commit", "command")}
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "test_log.jsonl").open("a") as log:
            log.write(json.dumps(record | {"checkpoint_hash": adapter, "reason": config.reason}) + "\n")
    low, high = result["ci95"]
    print(
        f"{config.name}: macro score {result['macro_mean']:.1f} [{low:.1f}, {high:.1f}], "
        f"success {result['success_rate']:.1%} ({result['benchmark']})"
    )
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped: an evaluation is written whole or not at all; run the same command again"
        ) from None
