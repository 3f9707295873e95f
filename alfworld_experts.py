"""Two experts for ALFWorld: an oracle that reads the hidden state, a searcher that reads texts like an agent.

The oracle answers from any state, so that it also labels what others play. The searcher looks where a thing
usually is (panels/alfworld_rooms.json), remembers what it saw, and is given texts only. What this file does
not do: plan optimally, or word subtasks and progress.
"""

import json
import re
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

from alfworld_fast import NOTHING, TREATMENTS, Engine, Goal, put_command

ROOMS = Path(__file__).parent / "panels" / "alfworld_rooms.json"


# --- the oracle ---------------------------------------------------------------------------------------------
def oracle(engine: Engine) -> Iterator[str]:
    """Commands until the goal holds; the caller plays each in `engine` before it asks for the next."""
    while not engine.won and (command := oracle_command(engine)):
        yield command


def oracle_command(engine: Engine) -> str | None:
    """The next command of a short solution from this state; None when no way is known: who took the roll of
    paper towels, which fits in no receptacle, keeps it.

    A choice is a receptacle and the command to give there; the one with the fewest steps to it is taken.
    """
    game, goal, names, held = engine.game, engine.game.goal, engine.game.names, engine.held
    kinds, inside = game.kinds, True  # inside: it must be open for the command
    if held is None:
        choices = {r: f"take {names[o]} from {names[r]}" for r, o in _wanted(engine)}
    elif not _useful(engine, held):
        fitting = [r for r in game.location if (kinds.get(r), kinds.get(held)) in game.can_contain]
        choices = {r: put_command(names[held], names[r], engine.grammar) for r in fitting}
    elif goal.lamp:
        inside = False
        choices = {r: f"use {names[o]}" for r, o in _things(engine) if kinds.get(o) == goal.lamp}
    elif not engine.ready(held):
        inside, appliance = False, TREATMENTS[goal.treatment][-1]
        places = [r for r in game.location if kinds.get(r) == appliance]
        choices = {r: f"{goal.treatment} {names[held]} with {names[r]}" for r in places}
    else:
        choices = {r: put_command(names[held], names[r], engine.grammar) for r in _targets(engine)}
    if not choices:
        return None
    r = min(choices, key=lambda r: (game.location[r] != engine.loc) + (inside and engine.closed(r)))
    if game.location[r] != engine.loc:
        return f"go to {names[r]}"
    return f"open {names[r]}" if inside and engine.closed(r) else choices[r]


def _things(engine: Engine) -> list[tuple[str, str]]:
    """(receptacle, object in it), sorted."""
    return [(r, o) for r, objects in engine.contents.items() for o in sorted(objects)]


def _useful(engine: Engine, o: str) -> bool:
    goal, game = engine.game.goal, engine.game
    ability = TREATMENTS[goal.treatment][2] if goal.treatment else "pickupable"
    return game.kinds.get(o) == goal.object and o in game.able["pickupable"] & game.able[ability]


def _wanted(engine: Engine) -> list[tuple[str, str]]:
    """(receptacle, object) of the goal's objects not yet in place; where some are treated, only those."""
    targets = _targets(engine)
    found = [(r, o) for r, o in _things(engine) if _useful(engine, o)]
    found = [(r, o) for r, o in found if not (r in targets and engine.ready(o))]
    return [(r, o) for r, o in found if engine.ready(o)] or found


def _targets(engine: Engine) -> list[str]:
    """The goal's receptacles; once one holds a thing of the goal, only this one: two belong together."""
    right = [r for r in engine.contents if engine.game.kinds.get(r) == engine.game.goal.receptacle]
    count = {r: sum(map(engine.ready, engine.contents[r])) for r in right}
    fullest = max(right, key=count.get, default=None)
    return [fullest] if fullest and count[fullest] else right


# --- the searcher -------------------------------------------------------------------------------------------
TASKS = {  # goal sentences of the six types -> (treatment, count)
    r"put two (\w+) in (\w+)": ("", 2),
    r"find two (\w+) and put them in (\w+)": ("", 2),
    r"put a clean (\w+) in (\w+)": ("clean", 1),
    r"clean some (\w+) and put it in (\w+)": ("clean", 1),
    r"put a hot (\w+) in (\w+)": ("heat", 1),
    r"heat some (\w+) and put it in (\w+)": ("heat", 1),
    r"put a cool (\w+) in (\w+)": ("cool", 1),
    r"cool some (\w+) and put it in (\w+)": ("cool", 1),
    r"put a (\w+) in (\w+)": ("", 1),
    r"put some (\w+) on (\w+)": ("", 1),
}
LOOK = (r"look at (\w+) under the (\w+)", r"examine the (\w+) with the (\w+)")


def parse_task(task: str) -> Goal:
    """The goal that a sentence of the official templates states. Raises ValueError for any other sentence."""
    for template, (treatment, count) in TASKS.items():
        if match := re.fullmatch(template, task):
            return Goal(match[1], receptacle=match[2], treatment=treatment, count=count)
    for template in LOOK:
        if match := re.fullmatch(template, task):
            return Goal(match[1], lamp=match[2])
    raise ValueError(f"unknown goal sentence {task!r}: expected an ALFWorld template, 'put a mug in desk'")


def things_in(obs: str) -> list[str]:
    """["apple 1", "mug 2"] of an observation that lists what one sees; [] when it lists nothing."""
    return re.findall(r"\ba (\w+ \d+)", obs.partition("you see ")[2].partition("\n")[0])


CLOSED = ("cabinet", "drawer", "fridge", "microwave", "safe")  # to look inside takes a second step


@cache
def homes() -> dict[str, dict[str, float]]:
    """Object type -> receptacle type -> mean number of such objects in one of them, in train games."""
    return json.loads(ROOMS.read_text())["homes"]


class Memory:
    """What the searcher keeps in mind: the receptacles of the room, where it stands, and for as long as one
    subtask lasts what it saw where, which is what the local progress of an agent can hold."""

    def __init__(self, receptacles: list[str]):
        self.receptacles = receptacles  # names, as listed at the start
        self.seen: dict[str, list[str]] = {}  # receptacle -> names of the objects in it
        self.here, self.shut = "", False  # the last receptacle visited, and whether it is closed

    def find(self, kind: str) -> tuple[str, str] | None:
        """(receptacle, object) where an object of the type is known to be."""
        seen = [(r, o) for r, objects in self.seen.items() for o in objects if _kind(o) == kind]
        return seen[-1] if seen else None

    def unseen(self, kind: str, avoid: str) -> list[str]:
        """Receptacles not yet looked into; first where an object of the type is likely for the steps."""
        chance = homes().get(kind, {})
        left = [r for r in self.receptacles if r not in self.seen and r != avoid]

        def merit(r: str) -> tuple:
            return -chance.get(_kind(r), 0.0) / (2 if _kind(r) in CLOSED else 1), _kind(r)

        return sorted(left, key=merit)


def _kind(name: str) -> str:
    return name.split(" ")[0]


Steps = Generator[str, str, tuple[str, str] | None]  # yields commands and is sent observations


def searcher(first_obs: str, grammar: str = "move") -> Steps:
    """Plays from texts alone: next() gives the first command, send(observation) each further one.

    Ends when it believes the goal reached, or has looked everywhere in vain. Things go into the receptacle
    of the goal's type that has the number 1, and are never taken from it where two belong together.
    """
    task = re.search(r"Your task is to: (.*?)\.?\s*$", first_obs)[1]
    goal, memory = parse_task(task), Memory(things_in(first_obs))
    target = f"{goal.receptacle} 1"
    for _ in range(goal.count):
        thing = yield from _find_and_take(memory, goal.object, target if goal.count > 1 else "")
        if thing is None:
            return
        if goal.lamp:
            if lamp := (yield from _search(memory, goal.lamp)):
                yield f"use {lamp[1]}"
            return
        if goal.treatment:
            appliance = f"{TREATMENTS[goal.treatment][-1]} 1"
            yield from _visit(memory, appliance, inside=False)
            yield f"{goal.treatment} {thing} with {appliance}"
        yield from _visit(memory, target)
        yield put_command(thing, target, grammar)


def _find_and_take(memory: Memory, kind: str, avoid: str) -> Steps:
    """-> the object, now held, or None."""
    if found := (yield from _search(memory, kind, avoid)):
        yield f"take {found[1]} from {found[0]}"
        return found[1]


def _search(memory: Memory, kind: str, avoid: str = "") -> Steps:
    """Looks into one receptacle after the other; -> (receptacle, object), or None."""
    memory.seen = {}
    while not (found := memory.find(kind)):
        if not (unseen := memory.unseen(kind, avoid)):
            return None
        r = unseen[0]
        known = r == memory.here and not memory.shut  # it listed its things, but that was another subtask
        memory.seen[r] = things_in((yield f"examine {r}") if known else (yield from _visit(memory, r)))
    return found


def _visit(memory: Memory, r: str, inside: bool = True) -> Generator[str, str, str]:
    """Goes there and, where the inside matters, opens it; -> the last observation."""
    obs = ""
    if r != memory.here:
        obs = yield f"go to {r}"
        if obs == NOTHING:  # it shares the place with the last one
            obs = yield f"examine {r}"
        memory.here, memory.shut = r, obs.endswith("is closed.")
    if inside and memory.shut:
        obs = yield f"open {r}"
        memory.shut = False
    return obs
