"""What this machine has and lacks, each with its fix: `python eval.py --check`.

Every check does the thing: plays a gold path in each world, counts official games, lets the base write.
What this file does not do: install anything.
"""

import os
import platform
from collections.abc import Callable

import torch

from acting import Policy, Request
from alfworld_games import SPLITS, read_games
from envs import EnvPool, read_panel
from model import load_backbone
from run import fast_precision, pick_device
from scripted import play_gold

OFFICIAL = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}  # solvable games of alfworld-download


def device() -> str:
    name, versions = pick_device("auto"), f"Python {platform.python_version()}, torch {torch.__version__}"
    if name == "cpu":
        threads = f"{torch.get_num_threads()} CPU threads that multiply in {fast_precision()}"
        return f"{versions}: {threads}; no CUDA device, and none is needed"
    square = torch.ones(64, 64, device=name, dtype=torch.bfloat16)
    (square @ square).sum().item()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{versions}: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"


def base() -> str:
    lm, tokenizer = load_backbone("base")
    (answer,) = Policy(lm.eval(), tokenizer).answer([Request("executor", "Action: open", 4, 0)])
    size = sum(p.numel() for p in lm.parameters()) / 1e6
    return f"base: {size:.1f}M parameters; 'Action: open' goes on {answer.text!r}"


def gold(env: str, split: str) -> str:
    """A gold path, typed into the real simulator, must reach the goal: the grammar of actions is right."""
    with EnvPool(env, 1, workers=0, max_steps=200) as pool:
        (episode,) = play_gold(pool, read_panel(env, "demo", split, 1)[:1], env)
    path = f"{env}: the gold path of {episode.task} {episode.variation}, {len(episode.turns)} actions,"
    if not episode.success:
        raise ValueError(f"{path} ends at score {episode.score:.0f}, expected 100: make setup")
    return f"{path} reaches score {episode.score:.0f}"


def official() -> str:
    if not os.environ.get("ALFWORLD_DATA"):
        fix = "pip install alfworld && alfworld-download && export ALFWORLD_DATA=~/.cache/alfworld"
        return f"alfworld: no official games, generated ones are played (for the official ones: {fix})"
    found = {split: len(read_games(split, "official")) for split in SPLITS}
    if found != OFFICIAL:
        raise ValueError(f"official games {found}, expected {OFFICIAL}: run alfworld-download again")
    return "alfworld: official games " + ", ".join(f"{n} {split}" for split, n in found.items())


CHECKS: dict[str, Callable[[], str]] = {
    "torch": device,
    "base": base,
    "scienceworld": lambda: gold("scienceworld", "dev"),
    "alfworld": lambda: gold("alfworld", "valid_seen"),
    "official games": official,
}


def check() -> bool:
    """Prints a line per check, with the fix where it fails; True if all is well."""
    failed = 0
    for name, run in CHECKS.items():
        try:
            print(f"ok    {run()}", flush=True)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            failed += 1
            print(f"FAIL  {name}: {error}", flush=True)
    print("all is well" if not failed else f"{failed} of {len(CHECKS)} checks failed")
    return not failed
