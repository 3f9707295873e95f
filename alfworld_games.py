"""Where ALFWorld games come from: the official files on this machine, or rooms that the project ships.

Official games are read from $ALFWORLD_DATA, in the layout of `alfworld-download` or packed
(<split>.jsonl.xz). Without them `generate` makes games of all six task types, each solved once by the oracle;
their scores are not ALFWorld scores, so every game says where it is from. What this file does not do: play.
"""

import json
import lzma
import os
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from alfworld_experts import ROOMS, oracle
from alfworld_fast import Engine, parse_game

SPLITS = ("train", "valid_seen", "valid_unseen")
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
GENERATED = {"train": 1200, "valid_seen": 140, "valid_unseen": 134}  # games where nobody says how many


@dataclass(frozen=True)
class GameFile:
    """One game as text: what both engines read."""

    id: str  # "<task type>-<object>-<movable>-<receptacle>-<room>/<trial>", the official folder
    task_type: str  # one of TASK_TYPES
    task: str  # goal sentence
    problem: str  # PDDL
    source: Literal["official", "generated"]

    @property
    def room(self) -> int:
        return int(self.id.split("/")[0].split("-")[-1])


def read_games(
    split: str, source: Literal["auto", "official", "generated"] = "auto", ids: Collection[str] | None = None
) -> list[GameFile]:
    """The games of a split; "auto" is official where $ALFWORLD_DATA is set, else generated (seed 0).

    ids: keep these only, in their order (all official train games together are 220 MB of text).
    Raises ValueError for an unknown split, source or id, FileNotFoundError where official games are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {SPLITS}")
    if source not in ("auto", "official", "generated"):
        raise ValueError(f"unknown source {source!r}: expected auto, official or generated")
    if source == "generated" or source == "auto" and not os.environ.get("ALFWORLD_DATA"):
        games = generate(split, GENERATED[split], seed=0)
    else:
        games = _official(_data(), split)
    if ids is None:
        return list(games)
    wanted = set(ids)
    found = {game.id: game for game in games if game.id in wanted}
    if missing := [name for name in ids if name not in found]:
        raise ValueError(
            f"{split} has no game {missing[0]!r} (and {len(missing) - 1} more of those asked for)"
        )
    return [found[name] for name in ids]


def find_game(name: str) -> GameFile:
    """The game of this id: made again when the id says generated, else read from $ALFWORLD_DATA.

    Raises ValueError for an id of no game, FileNotFoundError as read_games.
    """
    if made := re.search(r"/generated_(\w+)_(\d+)_(\d+)$", name):
        game = _generated(made[1], int(made[2]), int(made[3])) if made[1] in SPLITS else None
        if game is None or game.id != name:
            raise ValueError(f"this version does not generate {name}: make the panel again (panels/make.py)")
        return game
    for split in reversed(SPLITS):  # the long one last
        if game := _by_id(_data(), split).get(name):
            return game
    raise ValueError(f"no game {name!r} in {_data()}: expected an official id, or a generated one")


def recorded_actions(name: str) -> list[str]:
    """The trajectory that comes with an official train game, as commands of grammar "move"."""
    folder = _data()
    packed, unpacked = folder / "gt_train.jsonl.xz", folder / "json_2.1.1" / "train" / name / "game.tw-pddl"
    if packed.exists():
        actions = _recorded(packed).get(name)
    else:
        actions = json.loads(unpacked.read_text()).get("walkthrough") if unpacked.exists() else None
    if not actions:
        raise ValueError(f"no recorded trajectory of {name}: only official train games have one")
    return [re.sub(r"^put (.+) in/on ", r"move \1 to ", action) for action in actions]


# --- official games -----------------------------------------------------------------------------------------
def _data() -> Path:
    if folder := os.environ.get("ALFWORLD_DATA"):
        return Path(folder).expanduser()
    raise FileNotFoundError(
        "official games need ALFWORLD_DATA, the folder of `pip install alfworld && alfworld-download`, "
        "to be set: export ALFWORLD_DATA=~/.cache/alfworld"
    )


@cache
def _by_id(folder: Path, split: str) -> dict[str, GameFile]:
    return {game.id: game for game in _official(folder, split)}


@cache
def _recorded(path: Path) -> dict[str, list[str]]:
    with lzma.open(path, "rt") as lines:
        return {row["id"]: row["actions"] for row in map(json.loads, lines)}


def _official(folder: Path, split: str) -> Iterator[GameFile]:
    packed, unpacked = folder / f"{split}.jsonl.xz", folder / "json_2.1.1" / split
    if packed.exists():
        yield from _packed(packed)
    elif unpacked.is_dir():
        yield from _unpacked(unpacked)
    else:
        raise FileNotFoundError(
            f"ALFWORLD_DATA={folder} has neither {packed.name} nor json_2.1.1/{split}: "
            "run `alfworld-download`, or unset ALFWORLD_DATA to play generated games"
        )


def _packed(path: Path) -> Iterator[GameFile]:
    """One JSON row per solvable game."""
    with lzma.open(path, "rt") as lines:
        for row in map(json.loads, lines):
            yield GameFile(row["id"], row["task_type"], row["task"], row["problem"], "official")


def _unpacked(folder: Path) -> Iterator[GameFile]:
    """The solvable games of the six types among <task>/<trial>/{game.tw-pddl, traj_data.json}."""
    found = 0
    for path in sorted(folder.glob("*/*/game.tw-pddl")):
        try:
            game = json.loads(path.read_text())
            task_type = json.loads(path.with_name("traj_data.json").read_text())["task_type"]
            task = re.search(r'Your task is to: (.*?)\.?"', game["grammar"])[1]
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path.parent} is not a game ({error}): run `alfworld-download -f` again"
            ) from None
        sliced = "Sliced" in path.parts[-3]  # as AlfredTWEnv: neither these nor movable receptacles
        if game["solvable"] and task_type in TASK_TYPES and not sliced:
            found += 1
            yield GameFile("/".join(path.parts[-3:-1]), task_type, task, game["pddl_problem"], "official")
    if not found:
        raise FileNotFoundError(f"no solvable game.tw-pddl below {folder}: run `alfworld-download`")


# --- generated games ----------------------------------------------------------------------------------------
START, FLOOR = (
    "loc_bar__minus_9_bar_0_bar_0_bar_30",
    "loc_bar__minus_8_bar_0_bar_0_bar_30",
)  # nothing is there
ROOM_KINDS = {  # hundreds of the room's number: 0 kitchens, 2 living rooms, 3 bedrooms, 4 bathrooms
    "pick_and_place_simple": (0, 2, 3, 4),
    "look_at_obj_in_light": (2, 3),
    "pick_clean_then_place_in_recep": (0, 4),
    "pick_heat_then_place_in_recep": (0,),
    "pick_cool_then_place_in_recep": (0,),
    "pick_two_obj_and_place": (0, 2, 3, 4),
}
TREATED = {  # task type -> (ability of its object, fact to reach, appliance)
    "pick_clean_then_place_in_recep": ("cleanable", "isClean", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("heatable", "isHot", "Microwave"),
    "pick_cool_then_place_in_recep": ("coolable", "isCool", "Fridge"),
}
SENTENCES = {
    "pick_and_place_simple": ("put a {} in {}", "put some {} on {}"),
    "look_at_obj_in_light": ("look at {} under the {}", "examine the {} with the {}"),
    "pick_clean_then_place_in_recep": ("put a clean {} in {}", "clean some {} and put it in {}"),
    "pick_heat_then_place_in_recep": ("put a hot {} in {}", "heat some {} and put it in {}"),
    "pick_cool_then_place_in_recep": ("put a cool {} in {}", "cool some {} and put it in {}"),
    "pick_two_obj_and_place": ("put two {} in {}", "find two {} and put them in {}"),
}
OPENABLE = {
    "Fridge": 1.0,
    "Microwave": 1.0,
    "Safe": 1.0,
    "Cabinet": 0.8,
    "Drawer": 0.85,
}  # share, as in train


@cache
def _table() -> dict:
    table = json.loads(ROOMS.read_text())
    for key in ("can_contain", "able"):
        table[key] = {name: set(kinds.split()) for name, kinds in table[key].items()}
    return table


def generate(split: str, count: int, seed: int = 0) -> list[GameFile]:
    """The first `count` games of a split and seed, the six task types in turn; all won by the oracle.

    The rooms of valid_unseen are in no other split, as in ALFRED. Game i does not depend on `count`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {SPLITS}")
    return [_generated(split, seed, i) for i in range(count)]


def _generated(split: str, seed: int, i: int) -> GameFile:
    rooms, unseen = _table()["rooms"], set(_table()["unseen"])
    rng, task_type = random.Random(f"{split} {seed} {i}"), TASK_TYPES[i % len(TASK_TYPES)]
    kinds = ROOM_KINDS[task_type]
    right = [int(n) for n in rooms if (int(n) in unseen) == (split == "valid_unseen")]
    numbers = [number for number in right if number // 100 in kinds]
    game = None
    while game is None or not _solvable(game):
        number = rng.choice(numbers)
        game = _make_game(task_type, number, rooms[str(number)], f"generated_{split}_{seed}_{i:05d}", rng)
    return game


def _solvable(game: GameFile) -> bool:
    """The oracle needs at least one and at most 50 steps."""
    engine, steps = Engine(parse_game(game.problem, game.task)), 0
    for steps, command in enumerate(oracle(engine), start=1):
        engine.step(command)
        if steps == 50:
            break
    return engine.won and steps > 0


def _make_game(task_type: str, number: int, room: dict, trial: str, rng: random.Random) -> GameFile | None:
    """A game of the type in this room, or None when the room cannot have one."""
    goal = _draw_goal(task_type, room, rng)
    if goal is None:
        return None
    thing, target = goal
    receptacles = [  # (id, type, place)
        (_identifier(kind, rng), kind, f"loc_bar_{place}_bar_0_bar_0_bar_30")
        for kind, places in room["receptacles"].items()
        for place in places
    ]
    objects = []  # (id, type, receptacle id or None, place)
    for kind in room["objects"].split():
        weights = _homes(room, kind)
        if kind == thing and task_type not in TREATED:
            weights.pop(target, None)  # nothing may start where it belongs
        chances = [weights.get(r, 0) for _, r, _ in receptacles]
        for _ in range(_how_many(kind, goal, task_type, rng)):
            r, _, place = rng.choices(receptacles, chances)[0] if any(chances) else (None, "", FLOOR)
            objects.append((_identifier(kind, rng), kind, r, place))
    task = rng.choice(SENTENCES[task_type]).format(thing.lower(), target.lower())
    name = f"{task_type}-{thing}-None-{target}-{number}/{trial}"
    problem = _problem(task_type, goal, receptacles, objects, rng)
    return GameFile(name, task_type, task, problem, "generated")


def _draw_goal(task_type: str, room: dict, rng: random.Random) -> tuple[str, str] | None:
    """(object type, type of the goal's receptacle or lamp), where the object is also found elsewhere."""
    table, kinds, receptacles = _table(), room["objects"].split(), room["receptacles"]
    ability, _, appliance = TREATED.get(task_type, ("pickupable", "", ""))
    able = table["able"]["pickupable"] & table["able"][ability]
    things = [kind for kind in kinds if kind in able and _homes(room, kind)]
    if task_type == "look_at_obj_in_light":
        pairs = [(k, "DeskLamp") for k in things if "DeskLamp" in kinds and _homes(room, "DeskLamp")]
    else:
        fits = [(k, r) for k in things for r in receptacles if k in table["can_contain"].get(r, ())]
        pairs = [(k, r) for k, r in fits if r != appliance and set(_homes(room, k)) - {r}]
    return rng.choice(pairs) if pairs and (not appliance or appliance in receptacles) else None


def _homes(room: dict, kind: str) -> dict[str, float]:
    """Receptacle types of the room -> how likely one of them holds an object of the type."""
    chance = _table()["homes"].get(kind.lower(), {})
    return {r: chance[r.lower()] for r in room["receptacles"] if r.lower() in chance}


def _how_many(kind: str, goal: tuple[str, str], task_type: str, rng: random.Random) -> int:
    if kind == goal[0]:
        return rng.randint(2 if task_type == "pick_two_obj_and_place" else 1, 3)
    if kind not in _table()["able"]["pickupable"]:
        return 1
    return rng.randint(1, 3) if rng.random() < 0.85 else 0


def _identifier(kind: str, rng: random.Random) -> str:
    """Like AI2-THOR's "Mug|+01.20|-00.45|+02.00" in PDDL; numbers in names follow the order of these."""

    def coordinate() -> str:
        return f"{rng.choice(('_plus_', '_minus_'))}0{rng.randint(0, 3)}_dot_{rng.randint(0, 99):02d}"

    stem = kind.removesuffix("Basin")
    parts = [stem, coordinate(), coordinate(), coordinate()] + [kind] * (stem != kind)
    return "_bar_".join(parts)


def _problem(
    task_type: str, goal: tuple[str, str], receptacles: list, objects: list, rng: random.Random
) -> str:
    """The PDDL problem, in the form of the official ones."""
    able, fits = _table()["able"], _table()["can_contain"]
    kinds, holders = sorted({kind for _, kind, *_ in objects}), sorted({kind for _, kind, _ in receptacles})
    places = sorted({place for *_, place in receptacles} | {START, FLOOR})
    declared = ["agent1 - agent"]
    declared += [f"{k}Type - otype" for k in kinds] + [f"{r}Type - rtype" for r in holders]
    declared += [f"{o} - object" for o, *_ in objects] + [f"{r} - receptacle" for r, *_ in receptacles]
    declared += [f"{place} - location" for place in places]
    facts = [f"receptacleType {r} {kind}Type" for r, kind, _ in receptacles]
    facts += [f"objectType {o} {kind}Type" for o, kind, *_ in objects]
    facts += [f"canContain {r}Type {k}Type" for r in holders for k in kinds if k in fits.get(r, ())]
    for ability in able:
        facts += [f"{ability} {o}" for o, kind, *_ in objects if kind in able[ability]]
    facts += [f"openable {r}" for r, kind, _ in receptacles if rng.random() < OPENABLE.get(kind, 0)]
    facts += [f"atLocation agent1 {START}"] + [f"inReceptacle {o} {r}" for o, _, r, _ in objects if r]
    facts += [f"receptacleAtLocation {r} {place}" for r, _, place in receptacles]
    facts += [f"objectAtLocation {o} {place}" for o, *_, place in objects]
    lines = ["(define (problem generated)", "(:domain alfred)", "(:objects", *declared, ")", "(:init"]
    lines += [f"({fact})" for fact in facts] + [")", f"(:goal {_goal(task_type, goal)})", ")"]
    return "\n".join(lines)


def _goal(task_type: str, goal: tuple[str, str]) -> str:
    thing, target = goal
    if task_type == "look_at_obj_in_light":
        lit = f"(objectType ?ot {target}Type) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l)"
        lit = f"(and {lit} (atLocation ?a ?l) (inReceptacle ?ot ?r))"
        held = f"(exists (?o - object ?a - agent) (and (objectType ?o {thing}Type) (holds ?a ?o)))"
        return f"(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) {lit}) {held})"
    one = f"(objectType ?o {thing}Type) (receptacleType ?r {target}Type) (inReceptacle ?o ?r)"
    if task_type == "pick_two_obj_and_place":
        first, second = one.replace("?o", "?o1"), one.replace("?o", "?o2")
        one = f"{first} (exists (?o2 - object) (and (not (= ?o1 ?o2)) {second}))"
        return f"(and (exists (?r - receptacle) (exists (?o1 - object) (and {one}))))"
    if task_type in TREATED:
        ability, state, _ = TREATED[task_type]
        one = f"({ability} ?o) ({state} ?o) {one}"
    return f"(and (exists (?r - receptacle) (exists (?o - object) (and {one}))))"
