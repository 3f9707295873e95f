"""Script: writes the episode lists: `python panels/make.py scienceworld`, `python panels/make.py alfworld`.

ScienceWorld's come from the simulator's own splits, ALFWorld's from the official games in $ALFWORLD_DATA and
from games that alfworld_games.py generates. Committed once; evaluation only reads them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from alfworld_games import GameFile, generate, read_games  # noqa: E402
from scienceworld_env import ScienceWorld  # noqa: E402

# The six types without data in the papers' panel; GLIDER and STEP-HRL both leave them out.
LEFT_OUT = {
    "inclined-plane-determine-angle",
    "inclined-plane-friction-named-surfaces",
    "inclined-plane-friction-unnamed-surfaces",
    "measure-melting-point-unknown-substance",
    "mendelian-genetics-known-plant",
    "mendelian-genetics-unknown-plant",
}
# The published panel was drawn from a simulator with 16 variations of these two (8 / 3 / 5); 1.2.3 has 20
# (10 / 5 / 5).
POWER = {"power-component", "power-component-renewable-vs-nonrenewable-energy"}
DEMO = [
    "find-animal", "find-non-living-thing", "lifespan-longest-lived", "lifespan-shortest-lived",
    "power-component", "chemistry-mix-paint-secondary-color", "use-thermometer", "melt",
]  # fmt: skip


def write(
    name: str, splits: dict[str, dict[str, list[int]]], split: str, most: dict[str, int], note: str
) -> None:
    lines = [f"{task} {variation}" for task in splits for variation in splits[task][split][: most[task]]]
    header = [f"# ScienceWorld {split}: {note}", f"# {len(lines)} episodes: task variation"]
    (Path(__file__).parent / f"scienceworld_{name}_{split}.txt").write_text("\n".join(header + lines) + "\n")


def alfworld() -> None:
    for split, count in {"train": 1200, "valid_seen": 60, "valid_unseen": 60}.items():
        write_games("official", split, read_games(split, "official"), "the solvable official games")
        games = generate(split, count)
        write_games("demo", split, games, "generated games, NOT official ones: a look-alike for quick runs")


def write_games(name: str, split: str, games: list[GameFile], note: str) -> None:
    lines = sorted(f"{game.task_type} {game.id}" for game in games)
    header = [f"# ALFWorld {split}: {note}", f"# {len(lines)} episodes: task type, game id"]
    (Path(__file__).parent / f"alfworld_{name}_{split}.txt").write_text("\n".join(header + lines) + "\n")


def scienceworld() -> None:
    world = ScienceWorld()
    full = {task: world.splits(task) for task in world.tasks}
    world.close()
    glider = {task: s for task, s in full.items() if task not in LEFT_OUT}
    demo = {task: full[task] for task in DEMO}
    for split in ("train", "dev", "test"):
        cap = {"train": 120, "dev": 10, "test": 10}[split]
        power = {"train": 8, "dev": 3, "test": 5}[split]
        most = {task: power if task in POWER else cap for task in glider}
        write(
            "glider",
            glider,
            split,
            most,
            f"the 24 types of GLIDER and STEP-HRL, the first {cap} variations of each",
        )
        everything = {task: 10_000 if split == "train" else 10 for task in full}
        write(
            "full",
            full,
            split,
            everything,
            "all 30 types" + ("" if split == "train" else ", the first 10 of each"),
        )
    write("demo", demo, "train", dict.fromkeys(demo, 40), "8 types, the first 40 variations of each")
    write("demo", demo, "dev", dict.fromkeys(demo, 5), "8 types, the first 5 variations of each")


if __name__ == "__main__":
    {"scienceworld": scienceworld, "alfworld": alfworld}[sys.argv[1]]()
