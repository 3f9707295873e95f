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
# GLIDER's offline-to-online experiment (arXiv:2505.19761, 4.4): held-out type -> types that train offline.
FAMILIES = {
    "test-conductivity": [
        "test-conductivity-of-unknown-substances", "power-component",
        "power-component-renewable-vs-nonrenewable-energy",
    ],
    "find-animal": [
        "find-living-thing", "find-non-living-thing", "find-plant", "grow-fruit", "grow-plant",
        "identify-life-stages-1", "identify-life-stages-2", "lifespan-longest-lived",
        "lifespan-longest-lived-then-shortest-lived", "lifespan-shortest-lived",
    ],
    "boil": [
        "freeze", "melt", "change-the-state-of-matter-of", "chemistry-mix",
        "chemistry-mix-paint-secondary-color", "chemistry-mix-paint-tertiary-color", "use-thermometer",
    ],
}  # fmt: skip


def spread(splits: dict, split: str, most: int) -> dict:
    """At most so many variations of each type, evenly spaced, every other one first: neighbours are alike."""
    chosen = {}
    for task, s in splits.items():
        count = min(most, len(s[split]))
        even = [s[split][i * len(s[split]) // count] for i in range(count)]
        chosen[task] = {split: even[::2] + even[1::2]}
    return chosen


def write(
    name: str, splits: dict[str, dict[str, list[int]]], split: str, most: dict[str, int], note: str
) -> None:
    lines = [f"{task} {variation}" for task in splits for variation in splits[task][split][: most[task]]]
    header = [f"# ScienceWorld {split}: {note}", f"# {len(lines)} episodes: task variation"]
    (Path(__file__).parent / f"scienceworld_{name}_{split}.txt").write_text("\n".join(header + lines) + "\n")


def alfworld() -> None:
    for split, count in {"train": 1200, "valid_seen": 60, "valid_unseen": 60}.items():
        write_games("official", split, read_games(split, "official"), "the solvable official games")
        if split == "train":
            kinds = {}
            for game in sorted(read_games(split, "official"), key=lambda game: (game.task_type, game.id)):
                kinds.setdefault(game.task_type, []).append(game)
            tenth = [game for kind in kinds.values() for game in kind[::10]]
            write_games("tenth", split, tenth, "every tenth official game of each type")
            heat = kinds["pick_heat_then_place_in_recep"]
            cold = [game for game in tenth if game not in heat]
            write_games("heat-family", split, cold, "the same without `heat`: offline data that lacks a verb")
            online = [game for i, game in enumerate(heat) if i % 9]
            write_games("heat", split, online, "official games that need `heat`, for online training")
            write_games("heat", "dev", heat[::9], "every ninth official train game that needs `heat`")
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
    for split, most in {"train": 40, "dev": 5}.items():
        some = spread(demo, split, most)
        note = f"8 types, {most} variations of each, evenly spaced"
        write("demo", some, split, dict.fromkeys(demo, most), note)
    base = {task: s for task, s in full.items() if task not in FAMILIES}
    write("without", base, "train", dict.fromkeys(base, 50), "all types but the held-out ones, 50 of each")
    for held_out, family in FAMILIES.items():
        own, rest = {held_out: full[held_out]}, {task: full[task] for task in family}
        offline, dev, note = spread(rest, "train", 60), spread(own, "dev", 50), "evenly spaced"
        write(f"{held_out}-family", offline, "train", dict.fromkeys(rest, 60), f"without {held_out}, {note}")
        write(held_out, own, "train", {held_out: 10_000}, "a held-out type, for online training")
        write(held_out, dev, "dev", {held_out: 50}, f"a held-out type, {note}")


if __name__ == "__main__":
    {"scienceworld": scienceworld, "alfworld": alfworld}[sys.argv[1]]()
