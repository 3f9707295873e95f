"""Script: the silent-bug hunt (exercise 10): offline RL with one real fault of the two releases in it.

    python exercises/hunt.py 3

The code is copied to out/hunt/3/code with the fault in one of its files, and trained from the same SFT policy
on the same data as the sound code in out/hunt/0. Printed are the numbers of both runs: which cannot be,
and what would make them so? docs/train_orl.md says what each one is; `diff` of the folders tells the answer.
"""

import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from solutions import FAULTS, HUNT

ROOT = Path(__file__).parent.parent
NEEDED = ("panels", "base")  # beside the code
SHOWN = (
    "q_mean", "value_mean", "advantage_mean", "weight_mean", "weight_p05", "weight_p95", "ess_share",
    "mc_bias", "mc_rank_corr", "logp_expert", "kl_sft",
)  # fmt: skip


def plant(number: int, folder: Path) -> None:
    """Copies the code to `folder`, with fault `number` in it; 0 is the sound code."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in NEEDED:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    if number:
        file, sound, faulty, _ = FAULTS[HUNT[number]]
        text = (folder / file).read_text()
        assert text.count(sound) == 1, f"{file} holds {sound!r} {text.count(sound)} times: mend solutions.py"
        (folder / file).write_text(text.replace(sound, faulty))


def run(code: Path, script: str, *flags: str) -> None:
    subprocess.run([sys.executable, code / script, *map(str, flags)], check=True)


def train(code: Path, script: str, out: Path, *flags: str) -> None:
    """Trains to `out` unless that is done; one that was stopped starts again."""
    if not (out / "policy.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        run(code, script, *flags, "--out", out)


def quantities(path: Path) -> dict[str, tuple[float, float]]:
    """metric -> its means over the first and the last third of the run."""
    series = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            series.setdefault(row["metric"], []).append(float(row["value"]))
    third = {name: max(1, len(values) // 3) for name, values in series.items()}
    return {
        name: (sum(values[: third[name]]) / third[name], sum(values[-third[name] :]) / third[name])
        for name, values in series.items()
    }


def table(sound: dict, other: dict) -> list[str]:
    names = ["critic/grad_norm", "actor/grad_norm"]
    names += [f"{level}/{quantity}" for level in ("planner", "executor", "progress") for quantity in SHOWN]
    lines = [f"{'first and last third of':26}{'the sound run':>22}{'this run':>22}"]
    for name in names:
        if name in sound and name in other:
            cells = [f"{first:10.3f} {last:10.3f}" for first, last in (sound[name], other[name])]
            lines.append(f"{name:26}{cells[0]:>22}{cells[1]:>22}")
    return lines


@dataclass(frozen=True)
class Config:
    number: tyro.conf.Positional[Literal[1, 2, 3, 4, 5, 6]]  # which fault
    games: int = 12  # generated games of each type to learn from
    steps: int = 60  # gradient steps
    max_steps: int = 50  # environment steps of an episode that the SFT policy plays
    out: Path = ROOT / "out" / "hunt"  # folder


def main(config: Config) -> None:
    out, sound, play = config.out, config.out / "0" / "code", ["--env", "alfworld", "--workers", 0]
    plant(0, sound)
    if not (out / "rollouts.jsonl").exists():
        print("once: an expert's paths through generated games, SFT on them, and what it plays")
        run(sound, "collect.py", *play, "--limit", config.games, "--out", out / "gold.jsonl")
        train(sound, "train_sft.py", out / "sft", "--data", out / "gold.jsonl", "--epochs", 1)
        found = ["--source", "policy", "--checkpoint", out / "sft", "--limit", max(1, config.games // 4)]
        found += ["--max-steps", config.max_steps]
        run(sound, "collect.py", *play, *found, "--out", out / "part.jsonl")
        (out / "part.jsonl").rename(out / "rollouts.jsonl")
    data = ["--init", out / "sft", "--expert", out / "gold.jsonl", "--rollouts", out / "rollouts.jsonl"]
    flags = ["--steps", config.steps, "--warmup-steps", config.steps // 2, "--rl.critic-lr", "1e-3"]
    found = []
    for kind in (0, config.number):
        plant(kind, out / str(kind) / "code")
        train(out / str(kind) / "code", "train_orl.py", out / str(kind) / "run", *data, *flags)
        found.append(quantities(out / str(kind) / "run" / "metrics.csv"))
    print("\n".join(table(*found)))


if __name__ == "__main__":
    main(tyro.cli(Config))
