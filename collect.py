"""Script: trajectories as JSONL: annotated gold paths, rollouts of a policy, or exploration (text for base/).

    python collect.py --source gold --panel demo --out out/mine/gold.jsonl
    python collect.py --source policy --checkpoint out/mine/sft --panel demo --out out/mine/rollouts.jsonl

Collection resumes: episodes already in the file are kept and not played again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import annotate
import completion
import scripted
from acting import Policy
from data import Episode, read_episodes, write_episodes
from envs import EnvName, EnvPool, read_panel
from hierarchy import Counts, Ends, episode_seed, rollout
from model import file_hash, load_policy, refuse_format
from run import fail, pick_device
from teacher import ChatTeacher

EXPERTS = ("gold", "recorded", "oracle", "stumble")


@dataclass(frozen=True)
class Config:
    out: Path  # JSONL file to write, or to go on with
    # who plays; recorded and oracle: ALFWorld only; stumble: gold with refused tries and actions in it;
    # practice: exploration, with the subtasks that it happened to complete
    source: Literal["gold", "recorded", "oracle", "stumble", "policy", "explore", "practice"] = "gold"
    env: EnvName = "scienceworld"  # which text world; alfworld is the fast engine
    panel: str = "demo"  # panels/<env>_<panel>_train.txt: data for training comes from train only
    limit: int = 0  # at most this many episodes of a task type; 0 is all
    repeats: int = 1  # plays every episode this often, each time with another seed
    max_steps: int = 50  # environment steps per episode (gold paths are replayed whole)
    checkpoint: Path | None = None  # policy folder, for --source policy
    gold: Path | None = None  # what --source gold wrote for the same panel, for --source stumble
    ends: Ends = "claim"  # what ends a subtask in play; a flat policy has none
    max_actions: int = 0  # cap on the actions of one subtask (--ends cap: its length); 0 is the world's own
    judge: Literal["rules", "chat"] = "rules"  # who verifies completion: rules, or the model at --teacher-url
    judge_noise: float = 0.0  # probability that a verdict is turned round
    temperature: float = 1.0  # of the executor; planner and progress sample at 0.7 of it (STEP-HRL's setting)
    slots: int = 32  # episodes played at once
    workers: int = 2  # simulator processes
    seed: int = 0  # of sampling and exploration
    threads: int = 0  # CPU threads of the policy; 0 leaves it to torch: all cores
    device: str = "auto"
    teacher_url: str = ""  # OpenAI-compatible endpoint: annotates gold paths; with --judge chat judges too
    teacher_model: str = "default"  # model name sent to that endpoint


def teacher_of(config: Config) -> ChatTeacher | None:
    return ChatTeacher(config.teacher_url, config.teacher_model) if config.teacher_url else None


def judge_of(config: Config) -> completion.Judge:
    """Whoever says that a subtask is complete, as --judge and --judge-noise choose."""
    by_rules = annotate.rules(config.env).judge
    judge = by_rules if config.judge == "rules" else teacher_of(config).judge
    return completion.noisy(judge, config.judge_noise, config.seed)


def annotated_gold(pool: EnvPool, panel: list, config: Config, expert: str) -> Iterator[Episode]:
    """An expert's paths that end at score 100, split into subtasks with progress after every step."""
    teacher, judge = teacher_of(config), judge_of(config)
    for episode in scripted.play_gold(pool, panel, config.env, expert):
        if episode.success:
            annotated = annotate.annotate(episode, teacher)  # judged by the rules
            by_rules = config.judge == "rules" and not config.judge_noise
            yield annotated if by_rules else completion.rejudge(annotated, judge)
        else:
            tqdm.write(
                f"left out: the {expert} path of {episode.task} {episode.variation} "
                f"ends at score {episode.score:.0f}"
            )


def stumbles(pool: EnvPool, panel: list, config: Config, repeat: int) -> Iterator[Episode]:
    """The panel's gold paths with refused tries, annotated; those that end at score 100 all the same."""
    gold = [e for e in read_episodes(config.gold) if (e.task, e.variation) in panel]
    seed, judge = episode_seed(config.seed, repeat), annotate.rules(config.env).judge
    for e in scripted.play_stumbling(pool, gold, config.env, seed, judge):
        if e.success:
            yield annotate.fill_in(e, [(s.subtask, s.start, s.end) for s in e.segments])


def play(pool: EnvPool, panel: list, config: Config, repeat: int) -> Iterator[Episode]:
    """The episodes of one pass over the panel."""
    if config.source == "stumble":
        return stumbles(pool, panel, config, repeat)
    if config.source in EXPERTS:
        return annotated_gold(pool, panel, config, config.source)
    if config.source in ("explore", "practice"):
        practice, seed = config.source == "practice", episode_seed(config.seed, repeat)
        explored = scripted.play_explore(pool, panel, config.env, seed, practice)
        return map(annotate.practised, explored) if practice else explored
    model, tokenizer, meta = load_policy(config.checkpoint, pick_device(config.device))
    refuse_format(config.checkpoint, meta, "roles")
    return rollout(
        pool, panel, Policy(model, tokenizer, config.temperature), judge_of(config), env=config.env,
        history=meta["history"], ends="episode" if meta.get("flat") else config.ends,
        max_actions=annotate.max_actions(config.env, config.max_actions),
        seed=episode_seed(config.seed, repeat), source=f"{source_name(config)}-{repeat}", counts=Counts(),
    )  # fmt: skip


def source_name(config: Config) -> str:
    """Who plays, as stored with every episode; a policy by a hash of its adapter and of how it plays."""
    if config.source == "policy":
        adapter, judge = file_hash(config.checkpoint / "adapter"), (config.judge, config.judge_noise)
        cap = annotate.max_actions(config.env, config.max_actions)
        how = (config.temperature, config.ends, cap, config.max_steps)
        return f"policy-{episode_seed(0, adapter, *judge, *how):016x}"[:15] + f"-seed{config.seed}"
    return "expert" if config.source == "gold" else config.source


def refuse_old_labels(kept: list[Episode], config: Config) -> None:
    """Going on with a file that the rules would label otherwise today would mix two kinds of data."""
    label = {"gold": annotate.annotate, "practice": annotate.practised}.get(config.source)
    some = {e.task: e for e in kept}.values()  # one of each type
    old = label and not config.teacher_url and any(label(e).segments != e.segments for e in some)
    if config.source == "stumble":
        names = {(e.task, e.variation): {s.subtask for s in e.segments} for e in read_episodes(config.gold)}
        old = any({s.subtask for s in e.segments} - names.get((e.task, e.variation), set()) for e in kept)
    if old:
        raise ValueError(f"{config.out} was labelled by other rules: choose another --out, or delete it")


def duplicates(episodes: list[Episode]) -> float:
    """Share of episodes whose (task, variation, actions) occurred before; cold sampling repeats itself."""
    keys = Counter((e.task, e.variation, tuple(t.action for t in e.turns)) for e in episodes)
    return 1 - len(keys) / max(1, len(episodes))


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.source == "policy" and config.checkpoint is None:
        raise ValueError("--source policy needs --checkpoint FOLDER: train one with train_sft.py")
    if config.source == "stumble" and config.gold is None:
        raise ValueError("--source stumble needs --gold FILE: what collect.py --source gold wrote")
    if config.judge == "chat" and not config.teacher_url:
        raise ValueError("--judge chat needs --teacher-url URL: an OpenAI-compatible endpoint")
    panel = read_panel(config.env, config.panel, "train", config.limit)
    kept = read_episodes(config.out) if config.out.exists() else []
    name = source_name(config)
    if strangers := {e.source for e in kept if e.source != name and not e.source.startswith(name + "-")}:
        raise ValueError(
            f"{config.out} holds episodes of {sorted(strangers)}, not of {name}: another player, or one that "
            "plays by other flags; choose another --out, or delete it"
        )
    refuse_old_labels(kept, config)
    done = Counter((e.task, e.variation) for e in kept)
    max_steps = 10**6 if config.source in EXPERTS else config.max_steps
    bar = tqdm(
        total=len(panel) * config.repeats,
        initial=min(sum(done.values()), len(panel) * config.repeats),
        desc=config.source,
    )
    with EnvPool(config.env, config.slots, config.workers, max_steps) as pool:
        for repeat in range(config.repeats):
            missing = [e for e in panel if done[e] <= repeat]
            for episode in play(pool, missing, config, repeat) if missing else ():
                write_episodes(config.out, [episode], append=True)
                bar.update()
    bar.close()
    episodes = read_episodes(config.out)
    mean = sum(max(0.0, e.score) for e in episodes) / len(episodes)
    print(
        f"{config.out}: {len(episodes)} episodes, mean score {mean:.1f}, "
        f"{duplicates(episodes):.1%} duplicates"
    )
    if config.source != "explore":
        s = completion.summary(episodes, config.ends)
        print(
            f"{s['count']} subtasks of {s['mean_length']} actions; claim and verdict agree after "
            f"{s['agreement']:.1%} of actions (precision {s['precision']}, recall {s['recall']})"
        )
        if config.judge == "chat" or config.judge_noise > 0:
            same = completion.agreement(episodes, annotate.rules(config.env).judge)
            print(f"verdicts are those of the rules after {same:.1%} of actions")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, ConnectionError, FileNotFoundError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
