"""Script: curves of online runs with 95% bands over seeds and episodes: <out>.json and <out>.svg.

    python recipes/curves.py --folder results/online/boil --arms glider awac ac --out results/o2o_boil
    python recipes/curves.py --folder results/online/alfworld --arms hiper gae group --out results/hiper

Reads <folder>/<arm>/seed*/evals.json, which train_o2o.py and train_hiper.py write.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from run import fail, provenance  # noqa: E402
from scores import bootstrap_ci, macro_mean  # noqa: E402

# Read from the figures of GLIDER (arXiv:2505.19761, Fig. 4), score x 100 at 0, 5,000 and 10,000 steps.
PUBLISHED = {
    "test-conductivity": {"glider": (10, 82, 98), "awac": (2, 15, 33), "ac": (2, 17, 25)},
    "find-animal": {"glider": (30, 78, 99), "awac": (10, 24, 60), "ac": (10, 26, 44)},
    "boil": {"glider": (11, 62, 93), "awac": (4, 23, 44), "ac": (1, 16, 42)},
}


@dataclass(frozen=True)
class Config:
    folder: Path  # holds one folder per arm, each with seed0, seed1, ...
    arms: tuple[str, ...]  # names of those folders
    out: Path  # without suffix


def curve(folder: Path) -> dict:
    """What the seeds of one arm reached at each of their evaluations."""
    files = sorted(folder.glob("seed*/evals.json"))
    runs = [json.loads(file.read_text()) for file in files]
    if not runs:
        raise ValueError(f"no {folder}/seed*/evals.json: run recipes/o2o.sh or recipes/hiper.sh first")
    points, count = [], min(len(run["evals"]) for run in runs)
    for rows in zip(*(run["evals"][:count] for run in runs), strict=True):
        x = "env_steps" if "env_steps" in rows[0] else "episodes"
        tasks = [task for task, _ in rows[0]["panel"]]
        clipped = [[max(0.0, score) for score in row["scores"]] for row in rows]
        solved = [[100.0 * (score == 100) for score in scores] for scores in clipped]
        points.append(
            {
                x: round(sum(row[x] for row in rows) / len(rows)),
                "score": round(sum(macro_mean(tasks, s) for s in clipped) / len(rows), 2),
                "ci95": [round(end, 2) for end in bootstrap_ci(tasks, clipped)],
                "seeds": [round(macro_mean(tasks, s), 2) for s in clipped],
                "success": round(sum(macro_mean(tasks, s) for s in solved) / len(rows), 2),
                "success_ci95": [round(end, 2) for end in bootstrap_ci(tasks, solved)],
            }
        )
    return {
        "seeds": len(runs),
        "episodes": len(tasks),
        "commands": [r["command"] for r in runs],
        "points": points,
    }


def draw(curves: dict[str, dict], published: dict, title: str) -> Figure:
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(title=title, ylabel="score, 95% band", ylim=(-2, 102))
    for number, (arm, found) in enumerate(curves.items()):
        points = found["points"]
        x = [p.get("env_steps", p.get("episodes")) for p in points]
        axes.plot(
            x, [p["score"] for p in points], f"C{number}-o", ms=3, label=f"{arm}, {found['seeds']} seeds"
        )
        axes.fill_between(x, *zip(*(p["ci95"] for p in points), strict=True), color=f"C{number}", alpha=0.2)
        if arm in published:
            axes.plot(
                [0, 5000, 10000], published[arm], f"C{number}x--", lw=0.7, label=f"{arm}, published (8B)"
            )
    axes.set_xlabel("environment steps" if "env_steps" in points[0] else "training episodes")
    axes.legend(fontsize=7)
    return figure


def main(config: Config) -> dict:
    curves = {arm: curve(config.folder / arm) for arm in config.arms}
    result = {"curves": curves, "published": PUBLISHED.get(config.folder.name, {}), **provenance()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{config.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    with matplotlib.rc_context({"svg.hashsalt": "nanohrl", "svg.fonttype": "none"}):
        chart = draw(curves, result["published"], config.folder.name)
        chart.savefig(f"{config.out}.svg", metadata={"Date": None})
    for arm, found in curves.items():
        ends = [found["points"][i] for i in (0, -1)]
        print(
            f"{arm}: "
            + " -> ".join(f"{p['score']:.1f} {p['ci95']}, solved {p['success']:.0f}%" for p in ends)
            + f", {found['seeds']} seeds"
        )
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
