"""Script: the silent-bug hunt (exercise 10): offline RL with one real fault of the two releases in it.

    python exercises/hunt.py 3

The code is copied to out/hunt/3/code with the fault in one of its files, and trained from the same SFT policy
on the same data as the sound code in out/hunt/0. Printed are the numbers of both runs: which cannot be,
and what would make them so? docs/metrics.md says what each one is; `diff` of the folders tells the answer.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

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


def main(number: int, games: int, steps: int, max_steps: int, out: Path) -> None:
    sound, play = out / "0", ["--env", "alfworld", "--workers", 0]
    plant(0, sound / "code")
    if not (out / "rollouts.jsonl").exists():
        print("once: an expert's paths through generated games, SFT on them, and what it plays")
        run(sound / "code", "collect.py", *play, "--limit", games, "--out", out / "gold.jsonl")
        run(sound / "code", "train_sft.py", "--data", out / "gold.jsonl", "--out", out / "sft", "--epochs", 1)
        found = ["--source", "policy", "--checkpoint", out / "sft", "--limit", max(1, games // 4)]
        found += ["--max-steps", max_steps]
        run(sound / "code", "collect.py", *play, *found, "--out", out / "part.jsonl")
        (out / "part.jsonl").rename(out / "rollouts.jsonl")
    for kind in dict.fromkeys((0, number)):
        folder = out / str(kind)
        plant(kind, folder / "code")
        if not (folder / "run" / "policy.json").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
            data = ["--expert", out / "gold.jsonl", "--rollouts", out / "rollouts.jsonl"]
            flags = [
                "--init",
                out / "sft",
                "--steps",
                steps,
                "--warmup-steps",
                steps // 2,
                "--rl.critic-lr",
                "1e-3",
            ]
            run(folder / "code", "train_orl.py", *flags, *data, "--out", folder / "run")
    found = [quantities(out / str(kind) / "run" / "metrics.csv") for kind in (0, number)]
    print("\n".join(table(*found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="A faulty run of offline RL beside a sound one: what is wrong?"
    )
    parser.add_argument("number", type=int, choices=sorted(HUNT), help="which fault")
    parser.add_argument("--games", type=int, default=12, help="generated games of each type to learn from")
    parser.add_argument("--steps", type=int, default=60, help="gradient steps")
    parser.add_argument("--max-steps", type=int, default=50, help="environment steps of an episode of SFT's")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "hunt", help="folder")
    main(**vars(parser.parse_args()))
