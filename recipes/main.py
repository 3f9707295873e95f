"""Script: the main table, from the runs of recipes/main.sh: results/main.json, and the rows as Markdown.

    python recipes/main.py

A row is one agent on one split: every seed's mean, their mean, and a 95% interval over seeds and episodes.
ScienceWorld: macro mean score over task types; ALFWorld: share of the games won. Rows that were not run yet
are left out and named.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from envs import read_panel  # noqa: E402
from run import fail, provenance  # noqa: E402
from scores import bootstrap_ci, macro_mean  # noqa: E402

# folder of runs, name of the evaluation, what played
ROWS = [
    ("glider", "sft", "SFT"),
    ("glider", "bc", "SFT, then cloning of its own successes"),
    ("glider", "orl", "SFT, then offline RL"),
    ("glider", "test", "SFT, then offline RL"),
    ("glider", "full", "SFT, then offline RL"),
    ("glider", "full100", "SFT, then offline RL, 100 steps"),
    ("alfworld", "sft_seen", "SFT"),
    ("alfworld", "orl_seen", "SFT, then offline RL"),
    ("alfworld", "sft_unseen", "SFT"),
    ("alfworld", "orl_unseen", "SFT, then offline RL"),
    ("alfworld_tenth", "sft_seen", "SFT, a tenth of the games"),
    ("alfworld_tenth", "orl_seen", "the same, then offline RL"),
]
PAIRS = [  # folder, a, b: what a gained over b, paired by episode (recipes/compare.py)
    ("glider", "orl", "sft"),
    ("glider", "orl", "bc"),
    ("alfworld", "orl_seen", "sft_seen"),
    ("alfworld_tenth", "orl_seen", "sft_seen"),
]
# Best published rows on the same splits, 50 steps; whose episodes and seeds are not published.
PUBLISHED = [
    # system, parameters, ScienceWorld dev, test, ALFWorld valid_seen, valid_unseen
    ("STEP-HRL (2604.05808), best backbone per column", "7 to 8 billion", 81.57, 77.81, 97.86, 97.76),
    ("STEP-HRL (2604.05808), Mistral", "7 billion", 80.28, 75.21, 96.43, 97.01),
    ("GLIDER (2505.19761), Llama-3", "8 billion", 77.43, 68.34, 71.56, 75.38),
]


@dataclass(frozen=True)
class Config:
    runs: Path = Path("out")  # what recipes/main.sh wrote
    out: Path = Path("results/main.json")


def row(files: list[Path], agent: str) -> dict:
    """One row from the results of eval.py, one file per seed."""
    runs = [json.loads(file.read_text()) for file in files]
    first, env = runs[0], runs[0]["benchmark"].split(",")[0]
    panel = read_panel(env, first["panel"], first["split"], first["limit"])
    # Published ALFWorld rows are shares of all games: one stratum.
    tasks = [task if env == "scienceworld" else env for task, _ in panel]
    scores = [[max(0.0, score) for score in run["scores"]] for run in runs]
    means = [macro_mean(tasks, s) for s in scores]
    return {
        "benchmark": first["benchmark"], "panel": first["panel"], "split": first["split"], "agent": agent,
        "max_steps": first["max_steps"], "episodes": len(panel),
        "seeds": [round(mean, 2) for mean in means], "score": round(sum(means) / len(means), 2),
        "ci95": [round(end, 2) for end in bootstrap_ci(tasks, scores)],
        "per_type": {
            task: round(sum(run["per_type"][task]["mean"] for run in runs) / len(runs), 1)
            for task in first["per_type"]
        },
        "tokens_per_step": round(sum(run["tokens_per_step"] for run in runs) / len(runs), 1),
        "commands": [run["command"] for run in runs], "commits": [run["commit"] for run in runs],
    }  # fmt: skip


def main(config: Config) -> dict:
    rows, missing = [], []
    for folder, name, agent in ROWS:
        files = sorted((config.runs / folder).glob(f"seed*/results/{name}.json"))
        if files:
            rows.append(row(files, agent))
        else:
            missing.append(f"{config.runs / folder}/seed*/results/{name}.json")
    if not rows:
        raise ValueError(f"no results below {config.runs}: run recipes/main.sh first")
    pairs = [config.runs / folder / f"compare_{a}_{b}.json" for folder, a, b in PAIRS]
    gains = [json.loads(file.read_text()) for file in pairs if file.exists()]
    result = {"rows": rows, "gains": gains, "published": PUBLISHED, **provenance()}
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print("| panel, split | agent | score | 95% interval | seeds | episodes |\n|---|---|---|---|---|---|")
    for r in rows:
        where = f"{r['benchmark'].split(',')[0]} {r['panel']}, {r['split']}"
        seeds, (low, high) = ", ".join(f"{s:.1f}" for s in r["seeds"]), r["ci95"]
        cells = [where, r["agent"], f"{r['score']:.1f}", f"{low:.1f} to {high:.1f}", seeds, r["episodes"]]
        print("| " + " | ".join(map(str, cells)) + " |")
    for g in gains:
        low, high = g["ci95"]
        print(f"{g['panel']}: {g['a']} - {g['b']} = {g['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
    print("".join(f"not run yet: {file}\n" for file in missing), end="")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
