"""ALFWorld (arXiv:2010.03768) in pure Python: the texts of the TextWorld engine without the engine.

A game is a PDDL problem and a goal sentence; the engine keeps its facts in sets and words them as the
package's grammar does, character for character (recipes/alfworld_difftest.py compares the two). What this
file does not do: find games (alfworld_games.py), play them well (alfworld_experts.py), limit steps.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

NOTHING = "Nothing happens."  # the answer to any command that is not admissible
HELP = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""
# "move X to Y" and `help` in the games 2.1.3; "put X in/on Y" and "You arrive at loc 7." in 2.1.1
GRAMMARS = {"move": ("move", "to"), "put": ("put", "in/on")}
# What makes an object clean, hot or cool: verb -> (fact gained, fact lost, ability, type of the appliance).
TREATMENTS = {
    "clean": ("isclean", "", "cleanable", "sinkbasin"),
    "heat": ("ishot", "iscool", "heatable", "microwave"),
    "cool": ("iscool", "ishot", "coolable", "fridge"),
}
KNIVES = ("knife", "butterknife")


# --- games --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Goal:
    """`count` treated objects of a type in one receptacle of a type, or one held beside a lit lamp."""

    object: str  # type, e.g. "apple"
    receptacle: str = ""  # type, e.g. "fridge"; "" for the lamp goal
    lamp: str = ""  # type of the lamp to switch on while holding the object
    treatment: str = ""  # a key of TREATMENTS
    count: int = 1


@dataclass(frozen=True)
class Game:
    """What never changes in a game, and the facts it starts with. Ids are the problem's, in lower case."""

    task: str  # goal sentence
    goal: Goal
    names: dict[str, str]  # id -> name in texts, "apple 1"
    ids: dict[str, str]  # name -> id
    kinds: dict[str, str]  # id of an object or receptacle -> type, "apple"
    location: dict[str, str]  # receptacle -> location, in the order of ids
    nearby: dict[str, list[str]]  # location -> receptacles there
    can_contain: set[tuple[str, str]]  # (type of receptacle, type of object)
    inside: dict[str, list[str]]  # object -> objects in it; only `examine` tells
    start: str  # location of the agent, where no receptacle is
    facts: dict[str, list[tuple[str, ...]]]  # initial facts by predicate
    able: dict[str, frozenset[str]]  # pickupable, openable, cleanable, ... -> ids


def parse_game(problem: str, task: str) -> Game:
    """The game of a PDDL problem (the text of initial_state.pddl) and its goal sentence.

    Raises ValueError: a text without init and goal, a goal of no known type, a receptacle in two places.
    """
    init, found, goal = problem.lower().partition("(:init")[2].partition("(:goal")
    if not found:
        raise ValueError(f"no (:init ...) and (:goal ...) in {problem[:60]!r}: expected a PDDL problem")
    facts = defaultdict(list)
    for predicate, arguments in re.findall(r"\((\w+) ([^()]*)\)", init):
        facts[predicate].append(tuple(arguments.split()))
    location = dict(sorted(facts["receptacleatlocation"]))
    if len(location) < len(set(facts["receptacleatlocation"])):
        raise ValueError("a receptacle at two locations: this engine knows games with one each")
    nearby = defaultdict(list)
    for receptacle, place in location.items():
        nearby[place].append(receptacle)
    inside = defaultdict(list)
    for inner, outer in sorted(facts["inreceptacleobject"]):
        inside[outer].append(inner)
    names = _names(sorted({x for rows in facts.values() for row in rows for x in row}))
    kinds = {x: kind.removesuffix("type") for x, kind in facts["receptacletype"] + facts["objecttype"]}
    can = {(r.removesuffix("type"), o.removesuffix("type")) for r, o in facts["cancontain"]}
    abilities = "pickupable openable cleanable heatable coolable toggleable sliceable isreceptacleobject"
    able = {ability: frozenset(x for (x,) in facts[ability]) for ability in abilities.split()}
    ids, start = {name: x for x, name in names.items()}, facts["atlocation"][0][1]
    goal = _parse_goal(goal)
    return Game(task, goal, names, ids, kinds, location, nearby, can, inside, start, dict(facts), able)


def _names(ids: list[str]) -> dict[str, str]:
    """ "drawer_bar_..." -> "drawer 3": numbers of a type fall in the order of sorted ids."""
    kinds = {x: x.split("_bar_")[0] + "basin" * ("basin" in x) for x in ids if "_bar_" in x}
    left, names = Counter(kinds.values()), {}
    for x, kind in kinds.items():
        names[x] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _parse_goal(goal: str) -> Goal:
    types = re.findall(r"\((object|receptacle)type \?(\w+) (\w+)type\)", goal)
    one = {variable: kind for _, variable, kind in types}
    treatment = [verb for verb, (gained, *_) in TREATMENTS.items() if f"({gained} ?" in goal]
    thing = one.get("o", one.get("o1"))
    if thing is None or ("ot" in one) == ("r" in one):
        raise ValueError(f"none of the six task types has the goal {' '.join(goal.split())[:200]!r}")
    return Goal(thing, one.get("r", ""), one.get("ot", ""), "".join(treatment), 2 if "o2" in one else 1)


def put_command(thing: str, receptacle: str, grammar: str) -> str:
    """How the grammar says that the held thing goes into the receptacle."""
    verb, where = GRAMMARS[grammar]
    return f"{verb} {thing} {where} {receptacle}"


# --- the engine ---------------------------------------------------------------------------------------------
class Engine:
    """One episode of a game; `won` says whether the goal holds now.

    loc: location of the agent; held: object or None; contents: receptacle -> objects in it; lying: object ->
    locations where it lies; taken: (object, receptacle) pairs it was taken from and not put back into.
    """

    def __init__(self, game: Game, grammar: str = "move"):
        if grammar not in GRAMMARS:
            raise ValueError(f"unknown grammar {grammar!r}: expected one of {list(GRAMMARS)}")
        self.game, self.grammar = game, grammar
        self.reset()

    def reset(self) -> str:
        """The first observation, with the goal sentence."""
        game, facts = self.game, self.game.facts
        self.loc, self.held, self.taken = game.start, None, set()
        self.contents, self.lying = {r: set() for r in game.location}, defaultdict(set)
        for o, r in facts.get("inreceptacle", ()):
            self.contents[r].add(o)
        for o, place in facts.get("objectatlocation", ()):
            self.lying[o].add(place)
        states = ("opened", "isclean", "ishot", "iscool", "istoggled", "issliced")
        self.true = {state: {x for (x,) in facts.get(state, ())} for state in states}
        self.won = self._goal_holds()
        room = self._list("a ", list(game.location))
        return (
            "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. "
            f"Looking quickly around you, you see {room}.\n\nYour task is to: {game.task}."
        )

    def step(self, command: str) -> tuple[str, bool]:
        """Plays one command; -> (observation, won). What is not admissible changes nothing."""
        obs = self._act(command.strip().split(" "))
        self.won = self._goal_holds()
        return obs or NOTHING, self.won

    def admissible(self) -> list[str]:
        """The commands that do something now, sorted; `help` only in grammar "move"."""
        game, held, names = self.game, self.held, self.game.names
        commands = {f"go to {names[r]}" for r, place in game.location.items() if place != self.loc}
        commands |= {"look", "inventory"} | ({"help"} if self.grammar == "move" else set())
        for r in game.nearby.get(self.loc, ()):
            name = names[r]
            commands.add(f"examine {name}")
            if r in game.able["openable"]:
                commands.add(f"close {name}" if r in self.true["opened"] else f"open {name}")
            commands |= {f"use {names[o]}" for o in self.contents[r] & game.able["toggleable"]}
            commands |= {f"take {names[o]} from {name}" for o in self._takeable(r)}
            if self._fits(r):
                commands.add(put_command(names[held], name, self.grammar))
            commands |= {f"{verb} {names[held]} with {name}" for verb in TREATMENTS if self._treats(verb, r)}
        if held is not None:
            commands.add(f"examine {names[held]}")
            if game.kinds.get(held) in KNIVES:
                here = [o for o in game.able["sliceable"] if self.loc in self.lying[o]]
                commands |= {f"slice {names[o]} with {names[held]}" for o in here}
        return sorted(commands)

    # --- one command; each answers None when it is not admissible
    def _act(self, words: list[str]) -> str | None:
        match words:
            case ["go", "to", *name]:
                return self._go(self._id(name))
            case ["open" | "close" as verb, *name]:
                return self._open(verb, self._id(name))
            case ["take", a, b, "from", *name]:
                return self._take(self._id([a, b]), self._id(name))
            case [verb, a, b, where, *name] if (verb, where) == GRAMMARS[self.grammar]:
                return self._put(self._id([a, b]), self._id(name))
            case ["clean" | "heat" | "cool" as verb, a, b, "with", *name]:
                return self._treat(verb, self._id([a, b]), self._id(name))
            case ["use", *name]:
                return self._use(self._id(name))
            case ["slice", a, b, "with", *name]:
                return self._slice(self._id([a, b]), self._id(name))
            case ["examine", *name]:
                return self._examine(self._id(name))
            case ["look"]:
                return self._look()
            case ["inventory"]:
                held = f": a {self.game.names[self.held]}" if self.held else None
                return f"You are carrying{held}." if held else "You are not carrying anything."
            case ["help"] if self.grammar == "move":
                return HELP

    def _go(self, r: str | None) -> str | None:
        place = self.game.location.get(r)
        if place in (None, self.loc):
            return None
        self.loc = place
        return f"You arrive at {self.game.names[r if self.grammar == 'move' else place]}. {self._examine(r)}"

    def _open(self, verb: str, r: str | None) -> str | None:
        opened = self.true["opened"]
        if not self._here(r) or r not in self.game.able["openable"] or (r in opened) == (verb == "open"):
            return None
        if verb == "close":
            opened.remove(r)
            return f"You close the {self.game.names[r]}."
        opened.add(r)
        return f"You open the {self.game.names[r]}. {self._examine(r)}"

    def _take(self, o: str | None, r: str | None) -> str | None:
        if not self._here(r) or o not in self._takeable(r):
            return None
        self.contents[r].remove(o)
        self.taken.add((o, r))
        self.lying[o].discard(self.loc)
        self.held = o
        return f"You pick up the {self.game.names[o]} from the {self.game.names[r]}."

    def _put(self, o: str | None, r: str | None) -> str | None:
        if o is None or o != self.held or not self._here(r) or not self._fits(r):
            return None
        self.contents[r].add(o)
        self.taken.discard((o, r))
        self.lying[o].add(self.loc)
        self.held = None
        return f"You {put_command(f'the {self.game.names[o]}', f'the {self.game.names[r]}', self.grammar)}."

    def _treat(self, verb: str, o: str | None, r: str | None) -> str | None:
        if o is None or o != self.held or not self._here(r) or not self._treats(verb, r):
            return None
        gained, lost, *_ = TREATMENTS[verb]
        self.true[gained].add(o)
        self.true.get(lost, set()).discard(o)
        return f"You {verb} the {self.game.names[o]} using the {self.game.names[r]}."

    def _use(self, o: str | None) -> str | None:
        if o not in self._near() & self.game.able["toggleable"]:
            return None
        self.true["istoggled"].add(o)  # never taken back: a second `use` says the same
        return f"You turn on the {self.game.names[o]}."

    def _slice(self, o: str | None, knife: str | None) -> str | None:
        if knife is None or knife != self.held or self.game.kinds.get(knife) not in KNIVES:
            return None
        if o not in self.game.able["sliceable"] or self.loc not in self.lying[o]:
            return None
        self.true["issliced"].add(o)
        return f"You sliced the {self.game.names[o]} with the {self.game.names[knife]}."

    # --- texts
    def _list(self, article: str, ids: list[str]) -> str:
        parts = [article + self.game.names[x] for x in ids]
        return ", ".join(parts[:-1]) + ", and " + parts[-1] if len(parts) > 1 else "".join(parts) or "nothing"

    def _examine(self, x: str | None) -> str | None:
        """A receptacle here, or the held object; the original offers no object that is not held."""
        if x is not None and x == self.held:
            return self._examine_object(x)
        if not self._here(x):
            return None
        name = self.game.names[x]
        if self.closed(x):
            return f"The {name} is closed."
        start = f"The {name} is open. In it" if x in self.game.able["openable"] else f"On the {name}"
        return f"{start}, you see {self._list('a ', sorted(self.contents[x]))}."

    def _examine_object(self, o: str) -> str:
        name, able = self.game.names[o], self.game.able
        if o in able["isreceptacleobject"]:
            return f"This is a normal {name}. In it, you see {self._list('a ', self.game.inside.get(o, []))}."
        clean, hot, cool, is_sliced, on = (
            o in self.true[state] for state in ("isclean", "ishot", "iscool", "issliced", "istoggled")
        )
        words = [word for word, holds in (("hot", hot), ("cool", cool), ("clean", clean)) if holds]
        if words or is_sliced and o in able["sliceable"]:
            state = "cold" if words == ["cool"] and not is_sliced else " and ".join(words)
            return f"This is a {' '.join([state] * bool(state) + ['sliced'] * is_sliced)} {name}."
        if o in able["toggleable"] and on:
            return f"This {name} is on."
        return f"There's nothing special about {name}."

    def _look(self) -> str:
        here = self.game.nearby.get(self.loc)
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        lying = [o for o in sorted(self.lying) if self.loc in self.lying[o]]
        floor = [o for o in lying for r in here if (o, r) in self.taken]
        return f"You are facing the {self._list('', here)}. Next to it, you see {self._list('a ', floor)}."

    # --- facts
    def _id(self, name: list[str]) -> str | None:
        return self.game.ids.get(" ".join(name))

    def _here(self, r: str | None) -> bool:
        return self.game.location.get(r) == self.loc

    def closed(self, r: str) -> bool:
        return r in self.game.able["openable"] and r not in self.true["opened"]

    def _near(self) -> set[str]:
        return {o for r in self.game.nearby.get(self.loc, ()) for o in self.contents[r]}

    def _takeable(self, r: str) -> set[str]:
        return set() if self.held or self.closed(r) else self.contents[r] & self.game.able["pickupable"]

    def _fits(self, r: str) -> bool:
        kinds = self.game.kinds
        return not self.closed(r) and (kinds.get(r), kinds.get(self.held)) in self.game.can_contain

    def _treats(self, verb: str, r: str) -> bool:
        *_, ability, appliance = TREATMENTS[verb]
        return self.held in self.game.able[ability] and self.game.kinds.get(r) == appliance

    def ready(self, o: str) -> bool:
        """Is it an object of the goal, clean, hot or cool where the goal asks for that?"""
        goal, game = self.game.goal, self.game
        if game.kinds.get(o) != goal.object:
            return False
        gained, _, ability, _ = TREATMENTS.get(goal.treatment, ("", "", "", ""))
        return not gained or o in game.able[ability] and o in self.true[gained]

    def _goal_holds(self) -> bool:
        goal, kinds = self.game.goal, self.game.kinds
        if goal.lamp:
            lit = {kinds.get(o) for o in self._near() & self.true["istoggled"]}
            return goal.lamp in lit and kinds.get(self.held) == goal.object
        return any(
            kinds.get(r) == goal.receptacle and sum(map(self.ready, held)) >= goal.count
            for r, held in self.contents.items()
        )
