"""Script: the whole pipeline on the demo panel, from gold paths to a table and a report. `make demo` runs it.

gold paths -> SFT -> rollouts of the SFT policy -> offline RL -> offline to online -> out/demo/report.html

In ScienceWorld SFT learns from stumbles too: gold paths with slips in them.

`make demo ENV=alfworld` does the same in ALFWorld, on generated games: they need no download, and their
scores are not those of the official games.

Every line that it runs is printed and can be typed by hand. An interrupted demo goes on where it stopped, of
a finished one the report alone is made again. To start anew, remove its folder.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    env: Literal["scienceworld", "alfworld"] = "scienceworld"  # which text world
    out: Path | None = None  # everything the demo makes; default: out/demo, or out/demo-alfworld
    seed: int = 0  # of training and sampling
    threads: int = 2  # CPU threads; another number gives other rounding, so another table


# Per world: the split that is evaluated, and what is said to the scripts besides.
SPLIT = {"scienceworld": "dev", "alfworld": "valid_seen"}
WORKERS = {"scienceworld": "", "alfworld": "--workers 0"}
SFT = {
    "scienceworld": "--rank 0 --lr 1e-3 --rename 0.5 --practice {out}/stumbles.jsonl",
    "alfworld": "--rank 0 --lr 1e-3 --epochs 1.5 --shares 1 2 2",
}
ORL = {"scienceworld": "", "alfworld": "--warmup-steps 200 --steps 260"}
ROLLOUTS = {"scienceworld": "--limit 20", "alfworld": "--limit 40 --workers 0"}


def stages(c: Config) -> list[tuple[str, str]]:
    """(file that proves the stage is done, command) in order."""
    o, common = c.out, f"--threads {c.threads} --seed {c.seed}"
    world = f"--env {c.env} --panel demo"
    sft = SFT[c.env].format(out=o)
    evaluate = f"eval.py {world} --split {SPLIT[c.env]} {WORKERS[c.env]} --out {o} {common}"
    train = [
        (
            f"{o}/gold.done",
            f"collect.py --source gold {world} {WORKERS[c.env]} --out {o}/gold.jsonl {common}",
        ),
        (
            f"{o}/results/zero-shot.json",
            f"{evaluate} --agent zero-shot --name zero-shot --limit 1",
        ),
        (f"{o}/sft/policy.json", f"train_sft.py --data {o}/gold.jsonl --out {o}/sft {sft} {common}"),
        (f"{o}/results/sft.json", f"{evaluate} --checkpoint {o}/sft --name sft"),
        (
            f"{o}/rollouts.done",
            f"collect.py --source policy --checkpoint {o}/sft {world} {ROLLOUTS[c.env]} "
            f"--out {o}/rollouts.jsonl {common}",
        ),
        (
            f"{o}/orl/policy.json",
            f"train_orl.py --init {o}/sft --expert {o}/gold.jsonl --rollouts {o}/rollouts.jsonl "
            f"--out {o}/orl --rl.temperature 0.2 --rl.critic-lr 1e-3 {ORL[c.env]} {common}",
        ),
        (f"{o}/results/offline-rl.json", f"{evaluate} --checkpoint {o}/orl --name offline-rl"),
        (
            f"{o}/o2o/policy.json",
            f"train_o2o.py --init {o}/orl --offline {o}/gold.jsonl {o}/rollouts.jsonl {world} --out {o}/o2o "
            f"--dev '' --env-steps 1500 --rl.temperature 0.2 --rl.critic-lr 1e-3 {WORKERS[c.env]} {common}",
        ),
        (f"{o}/results/online.json", f"{evaluate} --checkpoint {o}/o2o --name online"),
    ]
    random = f"{evaluate} --agent random --name random"
    if c.env == "scienceworld":  # one random episode of each type: listing its valid actions is slow
        files = f"--gold {o}/gold.jsonl --out {o}/stumbles.jsonl"
        stumbles = f"collect.py --source stumble {world} {files} {common}"
        random_row = (f"{o}/results/random.json", f"{random} --limit 1")
        return [random_row, train[0], (f"{o}/stumbles.done", stumbles), *train[1:]]
    expert = f"{evaluate} --agent gold --name expert"
    return [*train, (f"{o}/results/random.json", random), (f"{o}/results/expert.json", expert)]


def main(config: Config) -> None:
    name = "demo" if config.env == "scienceworld" else f"demo-{config.env}"
    config = replace(config, out=config.out or Path("out") / name)
    config.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    left = [(done, command) for done, command in stages(config) if not Path(done).exists()]
    if not left:
        print(f"{config.out} holds a finished demo; to run it anew, remove that folder first")
    for done, command in left:
        print(f"\n$ python {command}", flush=True)
        resume = ["--resume"] if "train_" in command and (Path(done).parent / "config.json").exists() else []
        subprocess.run([sys.executable, *shlex.split(command), *resume], cwd=ROOT, check=True)
        if done.endswith(".done"):
            Path(done).touch()
    subprocess.run([sys.executable, "plot.py", "--run", str(config.out)], cwd=ROOT, check=True)
    print(f"{(time.time() - began) / 60:.1f} minutes in all; open {config.out}/report.html")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
