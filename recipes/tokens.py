"""Script: tokens per environment step, all roles together, under each memory -> results/tokens.json.

    python recipes/tokens.py --data out/glider/gold.jsonl

Prompts and answers of annotated episodes are counted, as training and acting word them; what a prompt shares
with every other of its role (its instruction, kept in the key-value cache) is counted apart. Nothing is
played.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from annotate import flat  # noqa: E402
from data import Episode, read_episodes, transitions  # noqa: E402
from model import load_backbone, prompt_ids, text_ids  # noqa: E402
from run import fail, provenance  # noqa: E402

# name -> (history, is it flat?)
AGENTS = {
    "local progress": ("progress", False),
    "full history, planner and executor": ("full", False),
    "full history, flat": ("full", True),
}


@dataclass(frozen=True)
class Config:
    data: Path  # annotated episodes (JSONL from collect.py)
    out: Path = Path("results/tokens.json")
    model: str = "base"  # whose tokenizer
    steps: tuple[int, ...] = (1, 10, 20, 30, 40)  # environment steps, from 1, that are reported


def per_step(episode: Episode, history: str, is_flat: bool, tokenizer) -> list[tuple[int, int]]:
    """(tokens read anew or written, tokens of instructions) of every environment step of an episode."""
    counts = [[0, 0] for _ in episode.turns]
    for t in transitions(flat(episode) if is_flat else episode, history, flat=is_flat):
        cached = len(text_ids(tokenizer, t.prompt.partition("\n")[0]))
        answer = len(text_ids(tokenizer, t.completion)) + 1  # EOS
        counts[t.turn][0] += len(prompt_ids(tokenizer, t.prompt)) - cached + answer
        counts[t.turn][1] += cached
    return [tuple(count) for count in counts]


def main(config: Config) -> dict:
    episodes, (_, tokenizer) = read_episodes(config.data), load_backbone(config.model)
    result = {"data": str(config.data), "model": config.model, "steps": config.steps, "agents": {}}
    for agent, (history, is_flat) in AGENTS.items():
        counted = [per_step(e, history, is_flat, tokenizer) for e in episodes]
        rows = []
        for step in config.steps:
            here = [c[step - 1] for c in counted if len(c) >= step]
            if not here:
                raise ValueError(f"no episode of {config.data} has {step} steps: lower --steps")
            new, cached = (round(sum(column) / len(here), 1) for column in zip(*here, strict=True))
            rows.append({"step": step, "episodes": len(here), "tokens": new, "cached": cached})
        result["agents"][agent] = rows
        print(f"{agent}: " + ", ".join(f"{r['tokens']:.0f} + {r['cached']:.0f}" for r in rows))
    config.out.write_text(json.dumps(result | provenance(), indent=1) + "\n")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError) as error:
        fail(error)
