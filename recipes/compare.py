"""Script: agent A against agent B over seeds, paired by episode.

<out>/seed*/results/{a,b}.json -> <out>/compare_a_b.json

    python recipes/compare.py --out out/glider --a orl --b sft
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import scores  # noqa: E402
from envs import read_panel  # noqa: E402
from run import fail, provenance  # noqa: E402


@dataclass(frozen=True)
class Config:
    out: Path  # folder with one subfolder seed<k> per seed, or of one run
    a: str = "orl"  # name of the row whose gain is asked
    b: str = "sft"  # name of the row it is compared with


def main(config: Config) -> dict:
    files = [
        [folder / "results" / f"{name}.json" for name in (config.a, config.b)]
        for folder in sorted(config.out.glob("seed*")) or [config.out]
    ]
    pairs = [[json.loads(f.read_text()) for f in pair] for pair in files if all(f.exists() for f in pair)]
    if not pairs:
        raise ValueError(
            f"no {config.a}.json and {config.b}.json in {config.out}/seed*/results or {config.out}/results: "
            "run eval.py for both"
        )
    first = pairs[0][0]
    tasks = [
        task
        for task, _ in read_panel(
            first["benchmark"].split(",")[0], first["panel"], first["split"], first["limit"]
        )
    ]
    clipped = [[[max(0.0, score) for score in row["scores"]] for row in pair] for pair in pairs]  # (S, 2, E)
    difference = [[a - b for a, b in zip(*pair, strict=True)] for pair in clipped]  # (S, E)
    result = {
        "a": config.a, "b": config.b,
        "benchmark": first["benchmark"], "panel": first["panel"], "split": first["split"],
        "seeds": [pair[0]["seeds"][0] for pair in pairs],
        "episodes": len(tasks), "max_steps": first["max_steps"],
        "a_macro": [pair[0]["macro_mean"] for pair in pairs],
        "b_macro": [pair[1]["macro_mean"] for pair in pairs],
        "difference": round(sum(scores.macro_mean(tasks, d) for d in difference) / len(difference), 2),
        "ci95": [round(x, 2) for x in scores.bootstrap_ci(tasks, difference)],
        "a_ci95": [round(x, 2) for x in scores.bootstrap_ci(tasks, [pair[0] for pair in clipped])],
        "b_ci95": [round(x, 2) for x in scores.bootstrap_ci(tasks, [pair[1] for pair in clipped])],
        **provenance(),
    }  # fmt: skip
    (config.out / f"compare_{config.a}_{config.b}.json").write_text(json.dumps(result, indent=1) + "\n")
    low, high = result["ci95"]
    print(
        f"{config.a} - {config.b} = {result['difference']:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"over {len(pairs)} seeds"
    )
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
