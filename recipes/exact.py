"""Script: how much of what an expert says a policy says too, by level and type, and what it says instead.

Every decision stands before the expert's own past, so that no mistake leads to another: a far quieter
yardstick than 40 episodes played, but blind to what mistakes lead to. The answers are greedy.

    python eval.py --agent gold --panel demo --split dev --out out/expert --name gold
    python recipes/exact.py --gold out/expert/episodes/gold.jsonl --checkpoint out/demo/sft out/demo/orl
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import scores  # noqa: E402
from acting import Policy, Request  # noqa: E402
from annotate import annotate, flat  # noqa: E402
from data import LEVELS, Episode, Transition, read_episodes, transitions  # noqa: E402
from hierarchy import MAX_NEW_TOKENS  # noqa: E402
from model import load_policy, refuse_format  # noqa: E402
from run import fail, pick_device, provenance  # noqa: E402


@dataclass(frozen=True)
class Config:
    gold: Path  # an expert's episodes of a dev split (eval.py --agent gold), annotated here
    checkpoint: tuple[Path, ...]  # policy folders
    out: Path = Path("out/exact")  # folder: writes <out>/<run>-<checkpoint>.json
    mistakes: int = 10  # of each level, the most frequent ones printed
    threads: int = 0  # CPU threads; 0 leaves it to torch: all cores
    device: str = "auto"


def said(policy: Policy, decisions: list[Transition], rows: int = 64) -> Iterator[str]:
    """The greedy answer to the prompt of each decision."""
    for start in range(0, len(decisions), rows):
        some = decisions[start : start + rows]
        requests = [Request(t.level, t.prompt, MAX_NEW_TOKENS[t.level], 0) for t in some]
        yield from (answer.text.strip() for answer in policy.answer(requests))


def agreement(episodes: list[Episode], decisions: list[list[Transition]], answers: list[list[str]]) -> dict:
    """level -> share of exact answers in percent (macro mean over types of that of an episode), and mistakes.

    decisions[e], answers[e]: those of episode e. ci95 draws episodes within each type.
    """
    result = {}
    for level in LEVELS:
        tasks, shares, wrong, count = [], [], Counter(), 0
        for episode, own, given in zip(episodes, decisions, answers, strict=True):
            pairs = [(t.completion.strip(), a) for t, a in zip(own, given, strict=True) if t.level == level]
            if pairs:
                tasks.append(episode.task)
                shares.append(100 * fmean(a == b for a, b in pairs))
                wrong.update((episode.task, *pair) for pair in pairs if pair[0] != pair[1])
                count += len(pairs)
        if not tasks:
            continue  # a flat agent has no planner
        result[level] = {
            "decisions": count,
            "exact": round(scores.macro_mean(tasks, shares), 2),
            "ci95": [round(x, 2) for x in scores.bootstrap_ci(tasks, [shares])],
            "per_type": {k: round(float(v.mean()), 2) for k, v in scores.by_type(tasks, shares).items()},
            "mistakes": [[n, *what] for what, n in wrong.most_common()],
        }
    return result


def main(config: Config) -> dict:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    episodes, results = [annotate(e) for e in read_episodes(config.gold) if e.success], {}
    if not episodes:
        raise ValueError(f"{config.gold} holds no solved episode: write it with eval.py --agent gold")
    for folder in config.checkpoint:
        model, tokenizer, meta = load_policy(folder, pick_device(config.device))
        refuse_format(folder, meta, "roles")
        is_flat = meta.get("flat", False)
        decisions = [transitions(flat(e) if is_flat else e, meta["history"], flat=is_flat) for e in episodes]
        every = [t for own in decisions for t in own]
        stream = tqdm(said(Policy(model.eval(), tokenizer), every), total=len(every), desc=folder.name)
        answers = iter(list(stream))
        found = agreement(episodes, decisions, [[next(answers) for _ in own] for own in decisions])
        for level, row in found.items():
            low, high = row["ci95"]
            share, count = f"{row['exact']:.1f}% [{low:.1f}, {high:.1f}]", row["decisions"]
            print(f"{folder} {level}: {share} of {count} decisions as the expert")
            for n, task, expected, answer in row["mistakes"][: config.mistakes]:
                print(f"  {n:3} x {task}: {expected!r}, said {answer!r}")
        name = f"{folder.parent.name}-{folder.name}"
        results[name] = {"gold": str(config.gold), "checkpoint": str(folder), "levels": found} | provenance()
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / f"{name}.json").write_text(json.dumps(results[name], indent=1) + "\n")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError) as error:
        fail(error)
