"""Script: one comparison of the papers, from gold paths to JSON and figure; the same command resumes it.

    python recipes/sweep.py --name ratio        # a wiring check of some minutes on the demo panel
    python recipes/sweep.py --name ratio --panel glider --seeds 0 1 2 --budget full

Arms that share a stage (gold paths, SFT, rollouts, offline RL) run it once. Every command is printed and kept
in the JSON: results/wiring/ or results/sweeps/<name>_<panel>.json, the figure beside it as .svg, and a report
page in out/sweep/<panel>-<budget>/<name>/report.html.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import scores  # noqa: E402
from envs import read_panel  # noqa: E402
from run import fail, provenance  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """Flags of one row, added to those of the budget. orl=None: SFT alone."""

    orl: str | None = ""
    sft: str = ""
    init: str | None = None  # flags of another SFT to start offline RL from; the rollouts stay those of `sft`
    play: str = ""  # flags of collection and evaluation alike


def one_flag(flag: str, values: str) -> dict[str, Arm]:
    """An arm per value of one flag of train_orl.py; the first is what the budget runs anyway."""
    first, *others = values.split()
    return {first: Arm()} | {value: Arm(f"--{flag} {value}") for value in others}


def mixed(expert: float, rollouts: float) -> Arm:
    return Arm(f"--expert-share {expert} --rollout-share {rollouts}")


UNTRAINED = "--epochs 0"  # an adapter that changes nothing
PAPER = "--rl.temperature 0.99"
SWEEPS: dict[str, dict[str, Arm]] = {
    "hierarchy": {  # GLIDER Fig. 3, Table 2
        "hierarchy, SFT": Arm(orl=None),
        "hierarchy, ORL": Arm(init=UNTRAINED),
        "hierarchy, SFT+ORL": Arm(),
        "flat, SFT": Arm(orl=None, sft="--flat"),
        "flat, ORL": Arm(sft="--flat", init=f"--flat {UNTRAINED}"),
        "flat, SFT+ORL": Arm(sft="--flat"),
    },
    "ratio": {  # expert : rollouts (GLIDER Fig. 5)
        "1:2": Arm(),
        "expert": mixed(1, 0),
        "10:1": mixed(10, 1),
        "5:1": mixed(5, 1),
        "2:1": mixed(2, 1),
        "1:1": mixed(1, 1),
        "1:5": mixed(1, 5),
        "1:10": mixed(1, 10),
        "rollouts": mixed(0, 1),
    },
    "history": {  # STEP-HRL's ablation
        "progress": Arm(),
        "full": Arm(sft="--history full"),
        "window": Arm(sft="--history window"),
    },
    "temperature": one_flag("rl.temperature", "0.2 0.05 0.5 0.99 inf"),
    "expectile": one_flag("rl.expectile", "0.7 0.5 0.9 0.95"),
    "released": {  # each paper as printed beside what its code computes; learning rates are the budget's
        "SFT": Arm(orl=None),
        **{
            name.replace("_", " "): Arm(f"--preset {name} {PAPER}")
            for system in ("glider", "step_hrl")
            for name in (f"as_published_{system}", f"as_released_{system}")
        },
    },
    "extraction": {  # how a policy is made of Q and V, and a critic that doubts the policy's own answers
        **one_flag("rl.actor", "awr q_weighted signed_advantage bc td3_bc"),
        "awr, CQL": Arm("--rl.conservative 1"),
    },
    "readings": {  # one reading at a time against the default
        "default": Arm(),
        "policy answers in V": Arm("--rl.value-answers policy"),
        "Q(s',a') in Q": Arm("--rl.bootstrap next_q"),
        "smdp discount": Arm("--rl.discount smdp"),
        "token mean": Arm("--rl.token-norm mean"),
        "frozen features": Arm("--rl.features frozen"),
        "progress paid by planner": Arm("--credit.progress planner"),
    },
    "completion": {  # who says that a subtask is complete, in the rewards and in play
        "judge": Arm(),
        "judge, noise 0.1": Arm("--credit.noise 0.1"),
        "judge, noise 0.3": Arm("--credit.noise 0.3"),
        "claim": Arm("--credit.completion claim"),
        "segment": Arm("--credit.completion segment"),
        "judge ends in play": Arm(play="--ends judge"),
        "new subtask every 5": Arm(play="--ends cap --max-actions 5"),
    },
}
# Flags of the stages: train_sft, collect --source policy, train_orl, eval.
BUDGETS = {
    "wiring": (
        "--epochs 0.6",
        "--limit 1 --max-steps 20",
        "--steps 14 --warmup-steps 4 --batch-size 32 --rl.temperature 0.2 --rl.critic-lr 1e-3",
        "--limit 1 --max-steps 20",
    ),
    "full": ("", "--limit 20", "--rl.temperature 0.2 --rl.critic-lr 1e-3", ""),
}
LABEL = {"wiring": "wiring check of a few minutes: proves that it runs, is no evidence", "full": ""}


@dataclass(frozen=True)
class Config:
    name: Literal[*SWEEPS]  # which comparison
    panel: str = "demo"  # episode lists of train and dev
    seeds: tuple[int, ...] = (0,)  # of training and sampling; a claim needs three
    budget: Literal["wiring", "full"] = "wiring"  # minutes, to see that it runs; full: the demo's settings
    threads: int = 2  # CPU threads
    out: Path = Path("out/sweep")  # runs and episodes; shared by all sweeps, so that nothing is trained twice
    results: Path = Path("results")  # JSON and figure go to its folder wiring/ or sweeps/


def stages(arm: Arm, seed: int, c: Config) -> dict[str, tuple[Path, str]]:
    """stage -> (file that proves it is done, command), in order; a folder is named by a hash of its flags."""
    sft, collect, orl, play = BUDGETS[c.budget]
    gold, work, plan = c.out / f"{c.panel}_gold.jsonl", c.out / f"{c.panel}-{c.budget}" / f"seed{seed}", {}
    common = f"--seed {seed} --threads {c.threads}"

    def folder(stage: str, *flags: str) -> Path:
        text = repr((BUDGETS[c.budget], flags))
        return work / f"{stage}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"

    def train(stage: str, flags: str) -> Path:
        out = folder("sft", flags)
        plan[stage] = (
            out / "policy.json",
            f"train_sft.py --data {gold} --out {out} {flags} {common}",
        )
        return out

    plan["gold"] = (
        gold.with_suffix(".done"),
        f"collect.py --source gold --panel {c.panel} --out {gold} --threads {c.threads}",
    )
    checkpoint = player = train("sft", f"{sft} {arm.sft}")
    if arm.orl is not None:
        rollouts = folder("rollouts", arm.sft, arm.play).with_suffix(".jsonl")
        plan["rollouts"] = (
            rollouts.with_suffix(".done"),
            f"collect.py --source policy --checkpoint {player} --panel {c.panel} --out {rollouts} "
            f"{collect} {arm.play} {common}",
        )
        init = player if arm.init is None else train("init", arm.init)
        checkpoint = folder("orl", str(arm))
        plan["orl"] = (
            checkpoint / "policy.json",
            f"train_orl.py --init {init} --expert {gold} --rollouts {rollouts} --out {checkpoint} "
            f"{orl} {arm.orl} {common}",
        )
    row = folder("row", str(arm)).name
    plan["eval"] = (
        work / "results" / f"{row}.json",
        f"eval.py --panel {c.panel} --checkpoint {checkpoint} --out {work} --name {row} "
        f"{play} {arm.play} {common}",
    )
    return plan


def run(done: Path, command: str) -> None:
    """Runs a stage unless its product is there; a training run goes on where it stopped."""
    if done.exists():
        return
    print(f"\n$ python {command}", flush=True)
    resume = ["--resume"] if "train_" in command and (done.parent / "config.json").exists() else []
    subprocess.run([sys.executable, *shlex.split(command), *resume], cwd=ROOT, check=True)
    if done.suffix == ".done":
        done.touch()


def show(arm: str, seed: int, plan: dict, c: Config) -> dict:
    """Copies a row, its episodes and its training curves to where plot.py reads them; returns the row."""
    name = f"{arm}, seed {seed}" if len(c.seeds) > 1 else arm
    file = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    here, done = c.out / f"{c.panel}-{c.budget}" / c.name, plan["eval"][0]
    row = json.loads(done.read_text()) | {"agent": name}
    (here / "results").mkdir(parents=True, exist_ok=True)
    (here / "episodes").mkdir(exist_ok=True)
    (here / "results" / f"{file}.json").write_text(json.dumps(row, indent=1) + "\n")
    shutil.copy(done.parent.parent / "episodes" / f"{done.stem}.jsonl", here / "episodes" / f"{file}.jsonl")
    if "orl" in plan:
        (here / file).mkdir(exist_ok=True)
        for part in ("metrics.csv", "config.json"):
            shutil.copy(plan["orl"][0].parent / part, here / file / part)
    return row


def interval(tasks: list[str], values: list[list[float]]) -> list[float] | None:
    """95% interval over seeds and episodes; None where no type has two episodes or seeds to draw from."""
    if len(values) * len(tasks) == len(set(tasks)):
        return None
    return [round(x, 2) for x in scores.bootstrap_ci(tasks, values)]


def compare(rows: dict[str, list[dict]], tasks: list[str]) -> dict[str, dict]:
    """Per arm: mean over seeds, interval, and the difference from the first arm, paired by seed, episode."""
    clipped = {arm: [[max(0.0, s) for s in row["scores"]] for row in of] for arm, of in rows.items()}
    first, table = next(iter(clipped.values())), {}
    for arm, of in rows.items():
        gain = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(clipped[arm], first, strict=True)]
        table[arm] = {
            "macro_means": [row["macro_mean"] for row in of],
            "macro_mean": round(sum(row["macro_mean"] for row in of) / len(of), 2),
            "ci95": interval(tasks, clipped[arm]),
            "difference": round(sum(scores.macro_mean(tasks, g) for g in gain) / len(gain), 2),
            "difference_ci95": interval(tasks, gain),
            **{k: [row[k] for row in of] for k in ("success_rate", "tokens_per_step", "subtasks")},
        }
    return table


def figure(table: dict[str, dict], title: str) -> Figure:
    """Scores of the arms with their intervals, the first arm on top."""
    chart = Figure(figsize=(7, 1.1 + 0.35 * len(table)), layout="constrained")
    axes, arms = chart.add_subplot(), list(table)
    means = [table[arm]["macro_mean"] for arm in arms]
    axes.barh(arms, means, color="#9dbde6")
    for y, arm in enumerate(arms):
        if ends := table[arm]["ci95"]:
            axes.plot(ends, [y, y], "|-", color="#16365f")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "macro score" + (", 95% interval" if table[arms[0]]["ci95"] else ", one episode of each type")
    )
    axes.set_title(title, fontsize=9)
    return chart


def main(config: Config) -> dict:
    os.chdir(ROOT)
    began, arms, rows, commands = time.time(), SWEEPS[config.name], {}, {}
    for arm, flags in arms.items():
        for seed in config.seeds:
            plan = stages(flags, seed, config)
            for done, command in plan.values():
                done.parent.mkdir(parents=True, exist_ok=True)
                run(done, command)
            rows.setdefault(arm, []).append(show(arm, seed, plan, config))
            commands[arm] = {stage: command for stage, (_, command) in plan.items()}  # of the last seed
    here = config.out / f"{config.panel}-{config.budget}" / config.name
    subprocess.run([sys.executable, "plot.py", "--run", str(here)], cwd=ROOT, check=True)
    first = rows[next(iter(rows))][0]
    tasks = [task for task, _ in read_panel("scienceworld", config.panel, "dev", first["limit"])]
    table = compare(rows, tasks)
    result = {
        "sweep": config.name, "label": LABEL[config.budget], "panel": config.panel, "split": "dev",
        "budget": config.budget, "seeds": list(config.seeds), "episodes": len(tasks),
        "arms": {arm: table[arm] | {"commands": commands[arm]} for arm in table},
        "minutes": round((time.time() - began) / 60, 2), **provenance(),
    }  # fmt: skip
    out = config.results / {"wiring": "wiring", "full": "sweeps"}[config.budget]
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{config.name}_{config.panel}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{config.name}, {config.panel} dev, {len(config.seeds)} seed(s)\n{LABEL[config.budget]}"
    with matplotlib.rc_context({"svg.hashsalt": "nanohrl", "svg.fonttype": "none"}):
        figure(table, title).savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    print(f"wrote {stem}.json and .svg after {result['minutes']} min; report in {here}/report.html")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
