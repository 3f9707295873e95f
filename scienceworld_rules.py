"""Subtasks, local progress and verdicts for ScienceWorld, by rules: what annotate.py asks of a world.

The progress is a pure function of what the progress policy sees. What this file does not do: play, train, or
tell how good its labels are (labels.py).
"""

import re

from prompts import compact, split_obs

MAX_ACTIONS, MAX_ACTIONS_IN_PLAY = 12, 15

# --- the house and its words ------------------------------------------------------------------------------
AROUND_THE_HALLWAY = ["art studio", "bedroom", "greenhouse", "kitchen", "living room", "workshop"]
DOORS = [("hallway", room) for room in AROUND_THE_HALLWAY]
DOORS += [("kitchen", "bathroom"), ("kitchen", "outside"), ("outside", "foundry"), ("outside", "greenhouse")]
ROOMS = [*AROUND_THE_HALLWAY, "hallway", "bathroom", "outside", "foundry"]
DISTANCE = {(a, b): 9 * (a != b) for a in ROOMS for b in ROOMS}  # in doors; 9 is more than any way takes
DISTANCE |= {pair: 1 for a, b in DOORS for pair in ((a, b), (b, a))}
for via in ROOMS:  # Floyd-Warshall
    DISTANCE = {(a, b): min(d, DISTANCE[a, via] + DISTANCE[via, b]) for (a, b), d in DISTANCE.items()}

# Names that a subtask may use unseen: the same in every house, the stages of life, and what connects.
COMMON_NAMES = f"""{" ".join(ROOMS)} thermometer metal pot sink stove freezer blast furnace oven water
    stopwatch shovel soil jug recipe battery wire block egg hatchling juvenile adult baby seed seedling stage
    reproducing tadpole caterpillar pupa terminal 1 2"""
PLAIN_WORDS = frozenset(  # words that name no object, place or number
    """a action activated after again all already an and anode another approximately are around asked at away
    be been before both bottom broken by cathode celsius checked choose close closed complete completed
    connect connected container containers contents cool current deactivated degrees dig done door doors
    down drop dropped dug eight eleven empty examine examined explore fill filled find finished first five
    focus focused for found four from get go got happened has have heat heated here in inside into
    inventory is it its known last look looked made make measure measured measures mix mixed move moved
    next nine no none not nothing now number of off on once one open opened or other out pick picked place
    placed pour poured produce produced put read reading reads request result room saw see seen seven six
    start started still subtask take taken temperature ten terminal than that the then there this three
    ticks time times to try turn turned twelve two understood until up use used wait waited was watch water
    with yet""".split()
)
REFUSED = r"No known action|Unknown action"


def words(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?|[a-z]+", text.lower())


def unknown_names(text: str, *sources: str) -> list[str]:
    """The words of `text` that are neither plain nor in its sources; a plural counts as its singular."""
    known = PLAIN_WORDS | {w for source in sources for w in words(source)}
    return [w for w in words(text) if not {w, w.removesuffix("s"), w + "s"} & known]


def raw_parts(obs: str) -> list[str]:
    """Feedback, room and inventory as the world wrote them, but for a missing space and titles of books."""
    return (untitled(obs.replace("wireits", "wire its")).split("\n\n") + ["", ""])[:3]


def untitled(text: str) -> str:
    """Without the titles of books, the only parentheses with a capital: "book (The Origin)" -> "book"."""
    return re.sub(r" \([A-Z][^()]*\)", "", text)


def room_of(obs: str) -> str:
    return (re.findall(r"is called (?:the )?([^.\n]+)\.", raw_parts(obs)[1]) or [""])[0]


# --- local progress ---------------------------------------------------------------------------------------
# Feedback and its sentence; first match wins. {0}: the action's object, {1} {2}: groups of the feedback.
OUTCOMES = [
    (r"^(?:The|A) ([\w ]+) appears broken", "the {1} is broken."),
    (r"^The door is (?:now|already) (\w+)", "the {0} is {1}."),
    (r"^The ([\w ]+) is (?:now|already) (\w+)", "the {1} is {2}."),
    (r"^You move to the ([\w ]+)", "in the {1}."),
    (r"You move the ([\w' -]+) to the inventory", "got the {1}."),
    (r"You move the ([\w' -]+) to the ([\w ]+)", "the {1} is in the {2}."),
    (r"^You focus on the (.+)", "focused on the {1}."),
    (r"measures a temperature of (-?\d+)", "temperature: {1} degrees celsius."),
    (r"mix to produce ([\w -]+)", "mixed to produce {1}."),
    (r"time reads (\d+) tick", "the stopwatch reads {1} ticks."),
    (r"([\w ]*block) approximately (\d+)%", "the {1} is {2}% down."),
    (r"([\w ]*block) at the bottom", "the {1} is at the bottom."),
    (r"^(.+?) is now connected to (.+)$", "connected {1} to {2}."),
    (r"^You pour the contents of the ([\w -]+) into the ([\w ]+)", "poured the {1} into the {2}."),
    (r"^The recipe reads:\W*To make ([\w ]+), you need to mix ([\w ,]+)", "to make {1}, mix {2}."),
    (r"^You dig", "dug up soil."),
    (r"^Ambiguous request", "asked to choose a number."),
    (r"can't move something into itself", "nothing happened."),
    (REFUSED, "the action is not understood."),
]
# Sentences of p_t that outlive the next action.
KEPT = [
    r"temperature: [^.]+\.", r"the \w+ is broken\.", r"poured [^.]+\.", r"connected [^.]+\.",
    r"the stopwatch reads [^.]+\.",
]  # fmt: skip
NUMBERS = "two three four five six seven eight nine ten eleven twelve"
COUNTS = ["once", *(f"{number} times" for number in NUMBERS.split())]


def outcome(previous: str, action: str, feedback: str) -> str:
    """One sentence on what the action brought; waits are counted on from the previous progress."""
    if action.startswith("wait"):
        before = re.search(r"waited (once|\w+ times)", previous)
        count = COUNTS.index(before[1]) + 1 if before and before[1] in COUNTS else 0
        return f"waited {COUNTS[min(count, len(COUNTS) - 1)]}."
    if action == "look around":
        return f"looked around the {feedback.split(':')[0]}."
    for pattern, sentence in OUTCOMES:
        if match := re.search(pattern, feedback):
            return sentence.format(re.sub(r"^(?:open|close|activate) ", "", action), *match.groups())
    return " ".join(f"saw {feedback}".split()[:10]) + "."


def progress_text(subtask: str, previous: str, action: str, feedback: str) -> str:
    """p_{t+1} from (subtask, p_t, a_t, feedback) alone: what the action brought, and what survives of p_t."""
    new = outcome(previous, action, " ".join(compact(feedback).split()))
    kept = [m[0] for pattern in KEPT if (m := re.search(pattern, previous)) and not re.match(pattern, new)]
    return " ".join(kept[-1:] + [new])


# --- subtasks and their completion ------------------------------------------------------------------------
_SELF = r"(?:pour (?:(?P<self>.+?) in(?:to)? (?P=self)|metal pot .* into metal pot.*)\n(?:open .+\n)*)?"
X, Y = "(?P<x>.+?)", "(?P<y>.+?)"
# Per kind: the coming actions (marked BROKEN or REFUSED; _SELF: poured into itself, as gold does),
# the name, completion: what feedback says ({x}: a part of x), what room or inventory shows. First wins.
# fmt: off
KINDS = [
    (r"(?:.+ REFUSED\n)+", "try another action", "(?!)", ""),
    (r"(?!)", "go to the {room}", "", ""),  # found by _walk
    (r"(?!)", "explore the {room}", "is called ", ""),
    (rf"(?:wait1?\n)+(?=focus on {X}\n)", "wait for the {x}", "You decide to wait", "room {x}"),
    (r"(?:wait1\n)+(?:look around\n|$)", "wait and look around", "is called ", ""),
    (rf"{_SELF}wait1?\n", "wait", "You decide to wait", ""),
    (rf"(?:examine {X}\n(?:use thermometer.+\n|$)|use thermometer(?: in inventory)? on {Y}\n)",
        "measure the temperature of the {x}", "measures a temperature of", ""),
    (rf"{_SELF}use shovel.*\npick up {X}\n", "dig up the {x}", "the {x} to the inventory", "inventory {x}"),
    (rf"move {X} to sink\nactivate sink(?: BROKEN\n|\ndeactivate sink\npick up .+\n)",
        "fill the {x} at the sink", "the {x} to the inventory|sink appears broken", "inventory {x} water"),
    (r"activate sink\n(?:move .+ to sink\npour .+\n)+(?:deactivate sink\n)?", "water {pots}",
        "sink is now deactivated", ""),
    (rf"move .*block to {Y}\nactivate stopwatch.*\n", "time the block on the {y}{carry}",
        "stopwatch is now activated", "room {y} block"),
    (r"(?:look at (?P<y>inclined.+)\n)+(?:deactivate stopwatch.*\nexamine stopwatch.*\n)?",
        "watch the block on the {y}", r"time reads \d+ ticks", ""),
    (rf"move {X} to {Y}\nactivate (?P=y)(?: BROKEN)?\n", "heat the {x} with the {y}",
        "The {y} (?:is now activated|appears broken)", "room {y} on {x}"),
    (rf"move {X} to {Y}\n(?:0\n)?", "put the {x} in the {y}",
        r"You move the {x} to the {y}\.", ""),
    (rf"{_SELF}(?:deactivate .+\n)*pick up {X}\n(?:0\n)?", "get the {x}",
        "You move the {x} to the inventory", "inventory {x}"),
    (rf"focus on {X}\n(?:0\n)?", "focus on the {x}", r"You focus on the {x}\.", ""),
    (r"connect (?!.+ REFUSED)(?P<link>.+)\n", "connect {link}",
        r"(?:^|\)){a} on {x} is now connected to {b} on {y}\.?$", ""),
    (rf"{_SELF}(?:examine .+\n)?mix {X}(?: containing .+)?\n", "mix the contents of the {x}",
        " mix to produce ", ""),
    (rf"{_SELF}pour {X} in(?:to)? {Y}\n(?:0\n)?",
        "pour the {x} into the {y}", r"You pour the contents of the [\w ]+ into the {y}\.", ""),
    (rf"(?:close door.+\n)+open {X}\n", "close the doors and open the {x}",
        "The {x} is (?:now|already) open", ""),
    (rf"drop {X}\n(?:0\n)?", "drop the {x}", r"You move the {x} to the {here}\.", ""),
    (rf"activate {X}\n", "turn on the {x}", "The {x} is now activated", ""),
    (rf"deactivate {X}\n", "turn off the {x}", "The {x} is (?:now|already) deactivated", ""),
    (rf"open {X}\n", "open the {x}", "The {x} is (?:now|already) open", ""),
    (rf"close {X}\n", "close the {x}", "The {x} is (?:now|already) closed", ""),
    (rf"(?:read|examine|look at) {X}\n", "examine the {x}", rf"^(?!{REFUSED}|Ambiguous|You )", ""),
]
# fmt: on
FORMS = "; ".join(dict.fromkeys(name for _, name, _, _ in KINDS))


def judge(subtask: str, obs: str) -> bool:
    """Whether the subtask is complete, from its text and the resulting observation; no unknown form ever is.

    A subtask at an appliance is also over when the appliance proves to be broken: the planner must know.
    """
    for _, form, said, shown in KINDS:
        form = form.replace("{carry}", "(?:, .*)?")
        form, said = (re.sub(r"\{(\w+)\}", r"(?P<\1>[\\w' (),-]+?)", text) for text in (form, said))
        if match := re.fullmatch(form, subtask):
            return _completed(match.groupdict(), said, shown, obs)
    return False


def _completed(goal: dict[str, str], said: str, shown: str, obs: str) -> bool:
    """Whether the observation says and shows what a kind asks for, about the things named in `goal`."""
    (feedback, room, inventory), here = raw_parts(obs), room_of(obs)
    answer = re.search(said, feedback)
    if not answer or goal.get("room", here) != here:
        return False
    if "link" in goal:
        return goal["link"] == _link(*answer.groups())
    goal = goal | {"here": here}
    if any(part and not {*words(part)} <= {*words(goal[k])} for k, part in answer.groupdict().items()):
        return False
    where, _, wanted = shown.format_map(goal).partition(" ")
    lines = {"room": room, "inventory": inventory}.get(where, "").split("\n")
    return "appears broken" in feedback or any({*words(wanted)} <= {*words(line)} for line in lines)


# --- names: a gold path's words are not always those that the agent reads ---------------------------------
def shown_name(name: str, obs: str) -> str:
    """`name` as the observation lists it: "butterfly" -> "butterfly egg", "plane b" -> "plane B"."""
    text = re.sub(r" titled [^\n,]*", "", "\n".join(reversed(raw_parts(obs)[1:])))
    ends = r"(?=,| \(|\)|\.|\n| in the (?!\w+ stage)|$)"
    items = re.findall(r"(?:\b[Aa]n?|\bthe|\bcalled) (?!substance called)([\w' -]+?)" + ends, text)
    same = [item for item in items if item.lower() == name.lower()]
    longer = [item for item in items if {*words(name)} <= {*words(item)}]
    return " ".join([*same, *longer, name][0].split())


def _referent(text: str, obs: str) -> str:
    """A gold path's referent in plain words: no place, no doubled adjective, the content for its vessel."""
    places = r"inventory|flower pot \d+|seed jar|outside|art studio|table|desk"
    text = re.sub(rf" in (?:self watering )?(?:{places})$", "", text)
    if found := re.match(r"substance in ([\w ]+)", text):
        inside = re.search(rf"{found[1]} \(containing (?:an? )?(?:substance called )?([\w ]+)", obs)
        return inside[1] if inside else text
    if found := re.match(r"[\w ]*?cup containing ([\w ]+)", text):
        return found[1]
    return shown_name(re.sub(r"^(\w+) (?=\1\b)|^egg (?=.* egg$)", "", text), obs)


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _link(end: str, thing: str, other_end: str, other: str) -> str:
    """A connection as its action says it, without the ends of the wire."""
    return f"{thing} to {other_end} in {other}" if thing.endswith(" wire") else f"{thing} {end} to {other}"


def _names(match: re.Match, feedbacks: list[str], i: int, obs: str) -> dict[str, str]:
    """What fills the form of the group matched at i; the world's words come before the gold path's."""
    groups = {key: value for key, value in match.groupdict().items() if value}
    fill = {key: _referent(value, obs) for key, value in groups.items()}
    fill.setdefault("x", fill.get("y", ""))
    waits = match[0].startswith("wait1")  # for what the next action focuses on
    said = "\n".join(feedbacks[i : i + match[0].count("\n") + waits])
    if found := re.search(r"You focus on the ([^\n]+)", said):
        stage = re.search(r" in the \w+ stage", groups.get("x", ""))
        fill["x"] = found[1] + (stage[0] if stage else "")
    elif found := re.search(r"You move the ([\w' -]+) to the ([\w -]+)", said):
        vessel = r"pick up .*(?:cup|metal pot)( containing (?!nothing)[\w ]+?)(?: in |$)"
        held = re.search(vessel, match[0].strip())
        fill["x"] = shown_name(found[1], obs) + (held[1] if held else "")
        fill |= {} if "inclined" in found[2] else {"y": found[2]}
    elif found := re.search(r"You pour the contents of the ([\w -]+) into the ([\w -]+)", said):
        fill |= {"y": found[2]} | ({} if "containing" in groups.get("x", "") else {"x": found[1]})
    if found := re.search(r"([\w ]+) on ([\w -]+) is now connected to ([\w ]+) on ([\w -]+)", said):
        fill["link"] = _link(*found.groups())
    fill["pots"] = _and(list(dict.fromkeys(re.findall(r"into the ([\w ]+)", said))))
    ticks = re.findall(r"reads (\d+) ticks", "\n".join(feedbacks[:i]))
    fill["carry"] = f", {ticks[-1]} ticks on the other" if ticks else ""
    return fill


# --- the split --------------------------------------------------------------------------------------------
def _marked(actions: list[str], feedbacks: list[str]) -> list[str]:
    """The actions as KINDS reads them: one a line, marked where something is broken or refused."""
    lines, refused = [], True
    for action, feedback in zip(reversed(actions), reversed(feedbacks), strict=True):
        asked = feedback.startswith("Ambiguous")  # a question that gets no good answer is refused too
        refused = bool(re.match(REFUSED, feedback)) or asked and refused
        lines.append(action + (" BROKEN" if "appears broken" in feedback else " REFUSED" * refused) + "\n")
    return lines[::-1]


def _walk(actions: list[str], observations: list[str], i: int) -> tuple[int, str]:
    """The longest walk from i without a detour, with a look around at its end: (end, name)."""
    start, end, goal, steps = room_of(observations[i]), i, "", 0
    for k in range(i + bool(re.match(r"pour (.+) in(?:to)? \1$", actions[i])), len(actions)):
        if actions[k].startswith("go to "):
            steps += 1
            if DISTANCE.get((start, actions[k][6:])) != steps:
                break
            end, goal = k + 1, actions[k][6:]
        elif not actions[k].startswith("open door"):
            break
    if actions[end : end + 1] == ["look around"]:
        return end + 1, f"explore the {goal or start}"
    return end, f"go to the {goal}"


def _other_kind(lines: list[str], feedbacks: list[str], i: int, obs: str) -> tuple[int, str]:
    """The first of KINDS that matches at i: (end, name)."""
    text = "".join(lines[i:])
    for look, form, _, _ in KINDS:
        if match := re.match(look, text):
            return i + match[0].count("\n"), form.format_map(_names(match, feedbacks, i, obs))
    return i + 1, "try another action"


def split(description: str, actions: list[str], observations: list[str]) -> list[tuple[str, int, int]]:
    """Groups of at most MAX_ACTIONS actions; N actions, N + 1 observations."""
    feedbacks = [untitled(split_obs(obs)[0]) for obs in observations[1:]]
    lines, groups, i = _marked(actions, feedbacks), [], 0
    while i < len(actions):
        end, name = _walk(actions, observations, i)
        if end == i:
            end, name = _other_kind(lines, feedbacks, i, observations[i])
            names = [subtask for subtask, _, _ in groups]
            seen = [description, *names, *feedbacks[i - 1 : i], observations[i], COMMON_NAMES]
            if unknown_names(name, *seen):  # no planner could find this name
                name = "try another action"
        groups += [(name, start, min(start + MAX_ACTIONS, end)) for start in range(i, end, MAX_ACTIONS)]
        i = end
    return groups
