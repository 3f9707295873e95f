"""Script: writes panels/alfworld_rooms.json: `python panels/make_rooms.py FOLDER`, where alfworld/ is.

Rooms, affordances and what fits where are those of the alfworld 0.4.2 wheel, MIT license, Copyright (c) 2020
Mohit Shridhar and others; FOLDER is site-packages, or the unzipped wheel (`pip download --no-deps
alfworld==0.4.2`). Where objects usually lie is counted in the official train games ($ALFWORLD_DATA).
Committed once.
"""

import json
import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from alfworld_fast import parse_game  # noqa: E402
from alfworld_games import read_games  # noqa: E402

ABOUT = (
    "Derived by panels/make_rooms.py from alfworld 0.4.2 (https://github.com/alfworld/alfworld, MIT license, "
    "Copyright (c) 2020 Mohit Shridhar and others); `homes` counted in the official train games."
)
UNSEEN = (10, 219, 308, 424)  # rooms of valid_unseen
HELD_OUT = (9, 29, 215, 226, 315, 325, 404, 425)  # rooms of ALFRED's test splits
BASINS = {"Sink": "SinkBasin", "Bathtub": "BathtubBasin"}
UNPLACED = {"Cabinet", "Drawer", "Shelf", "Safe"}  # the layouts have all of these
FIXED = set(
    "Bathtub Blinds Chair Curtains DeskLamp FloorLamp HousePlant LaundryHamperLid LightSwitch Mirror "
    "Painting Poster ShowerDoor ShowerGlass Sink StoveKnob Television Window Faucet".split()
)  # never pickupable in the train games


def room(layouts: Path, number: int, receptacles: set[str], objects: set[str]) -> dict:
    """{receptacle type: index of the place of each}, object types. What is seen from one pose shares a place.

    The layout has no pose for some receptacles: each such type gets one (stove burners: four), apart.
    """
    poses = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text())
    types = set(json.loads((layouts / f"FloorPlan{number}-objects.json").read_text()))
    places, found = {}, defaultdict(list)
    for name, pose in sorted(poses.items()):
        kind = name.split("|")[0]
        kind = BASINS.get(kind, kind)
        if kind in receptacles:
            found[kind].append(places.setdefault(tuple(pose), len(places)))
    for n, kind in enumerate(sorted((types & receptacles) - set(found) - UNPLACED)):
        found[kind] = [len(places) + n] * (4 if kind == "StoveBurner" else 1)
    return {"receptacles": dict(sorted(found.items())), "objects": " ".join(sorted(types & objects))}


def homes() -> dict[str, dict[str, float]]:
    """Object type -> receptacle type -> mean number of such objects in one, over rooms that have any."""
    things, places = Counter(), Counter()
    for row in read_games("train", source="official"):
        game = parse_game(row.problem, row.task)
        inside = [(game.kinds[o], game.kinds[r]) for o, r in game.facts["inreceptacle"]]
        things.update(inside)
        here = Counter(game.kinds[r] for r in game.location)
        for kind in {kind for kind, _ in inside}:
            places.update({(kind, r): n for r, n in here.items()})
    table = defaultdict(dict)
    for (kind, r), n in sorted(things.items()):
        if n / places[kind, r] >= 0.005:
            table[kind][r] = round(n / places[kind, r], 3)
    return table


def main(wheel: Path) -> None:
    constants = runpy.run_path(str(wheel / "alfworld/gen/constants.py"))
    receptacles = constants["RECEPTACLES"] - set(constants["MOVABLE_RECEPTACLES"]) - {"PaintingHanger"}
    objects = constants["OBJECTS_SET"] - receptacles
    layouts = wheel / "alfworld/gen/layouts"
    numbers = [n for n in sorted(constants["SCENE_NUMBERS"]) if n not in HELD_OUT]
    fits = {r: set(kinds) & objects for r, kinds in constants["VAL_RECEPTACLE_OBJECTS"].items()}
    able = {
        ability.lower(): set(kinds) & objects for ability, kinds in constants["VAL_ACTION_OBJECTS"].items()
    }
    able |= {
        "pickupable": objects - FIXED,
        "isReceptacleObject": constants["MOVABLE_RECEPTACLES_SET"] & objects,
    }
    table = {
        "about": ABOUT,
        "unseen": list(UNSEEN),
        "can_contain": {r: " ".join(sorted(kinds)) for r, kinds in sorted(fits.items()) if r in receptacles},
        "able": {ability: " ".join(sorted(kinds)) for ability, kinds in sorted(able.items())},
        "homes": homes(),
        "rooms": {n: room(layouts, n, receptacles, objects) for n in numbers},
    }
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):  # one entry a line
            rows = [f"{json.dumps(str(k))}: {json.dumps(v, separators=(',', ':'))}" for k, v in value.items()]
            lines.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    Path(__file__).with_name("alfworld_rooms.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
