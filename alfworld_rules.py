"""Subtasks, local progress and verdicts for ALFWorld, by rules: what annotate.py asks of a world.

Every trajectory falls into the same few subtasks, each ended by one kind of answer: find and take, clean,
heat, cool, put, use. The notes of a search say whether the wanted thing is here and, of each type of
receptacle, the number reached, since the searching expert goes from the highest number down. What this file
does not do: play.
"""

import re

from prompts import SEPARATOR, compact

MAX_ACTIONS = MAX_ACTIONS_IN_PLAY = 50  # a search may be long: at a cut its notes would be lost
COMMON_NAMES = ""  # every name comes from the task or from the list of receptacles
PLAIN_WORDS = frozenset(
    """a action and another at carrying clean cleaned close closed cool cooled examine find from go happened
    heat heated help in into inventory is look move moved no not nothing on open pick picked put searched
    slice take the there to took try turn turned up use used using with you""".split()
)
# Per kind: the answer that ends it (compacted), its name, what proves it: {x} a type, {r} a receptacle.
KINDS = [
    (
        r"You pick up (?P<x>\w+) \d+ from (?P<r>\w+ \d+)",
        "find and take {x}, not from {r}",
        r"You pick up {x} \d+ from (?!{r}$)",
    ),
    (r"You pick up (?P<x>\w+) \d+ from", "find and take {x}", r"You pick up {x} \d+ from"),
    (r"You clean (?P<x>\w+) \d+ using", "clean {x}", r"You clean {x} \d+ using"),
    (r"You heat (?P<x>\w+) \d+ using", "heat {x}", r"You heat {x} \d+ using"),
    (r"You cool (?P<x>\w+) \d+ using", "cool {x}", r"You cool {x} \d+ using"),
    (r"You move (?P<x>\w+) \d+ to (?P<r>\w+ \d+)", "put {x} in {r}", r"You move {x} \d+ to {r}$"),
    (r"You turn on (?P<x>\w+) \d+", "use {x}", r"You turn on {x} \d+"),
]
FORMS = "; ".join(name for _, name, _ in KINDS)


def unknown_names(text: str, *sources: str) -> list[str]:
    """The words and numbers of `text` that are neither plain nor in its sources."""
    known = PLAIN_WORDS.union(*(re.findall(r"[a-z]+|\d+", source.lower()) for source in sources))
    return [word for word in re.findall(r"[a-z]+|\d+", text.lower()) if word not in known]


PAST = {"pick": "picked", "move": "moved", "clean": "cleaned", "heat": "heated", "cool": "cooled"}


# --- local progress -----------------------------------------------------------------------------------------
def progress_text(subtask: str, previous: str, action: str, feedback: str) -> str:
    """p_{t+1} from (subtask, p_t, a_t, feedback) alone: where was searched, and what the action brought."""
    feedback = " ".join(compact(feedback).split())
    wanted = re.match(r"(?:find and take|use) (\w+)", subtask)
    searching = wanted and not _proved(subtask, feedback)
    searched = re.search(r"searched ([^.]*)\.", previous) if searching else None
    places = dict(re.findall(r"(\w+) (\d+)", searched[1])) if searched else {}
    listed = re.match(r"(\w+) (\d+): ", feedback)
    if listed and searching:
        places.pop(listed[1], None)  # the latest comes last
        places[listed[1]] = listed[2]
    notes = [_found(wanted[1], feedback)] if listed and searching else []
    notes += ["searched " + ", ".join(f"{kind} {number}" for kind, number in places.items())] * bool(places)
    if listed:
        notes += [] if searching else [f"at {listed[1]} {listed[2]}"]
    elif closed := re.match(r"(\w+ \d+) is closed$", feedback):
        notes += [f"at {closed[1]}, closed"]
    elif feedback.startswith("Nothing happens"):
        notes += [f"{action}: nothing happened"]
    else:
        done = re.sub(r"^You (\w+)", lambda m: PAST.get(m[1], m[1]), feedback)
        notes += [" ".join(done.split()[:10])]
    return ". ".join(notes) + "."


def _found(wanted: str, feedback: str) -> str:
    """Whether what is looked for is in the list just read, in the words of base/pretrain.py's questions."""
    here = re.findall(rf"\b{wanted} \d+", feedback.partition(": ")[2])
    return f"Is there {wanted}? {here[-1] if here else 'no'}"


# --- subtasks and their completion --------------------------------------------------------------------------
def judge(subtask: str, obs: str) -> bool:
    """Whether the subtask is complete, from its text and the resulting observation."""
    return _proved(subtask, compact(obs.split(SEPARATOR)[0]))


def _proved(subtask: str, feedback: str) -> bool:
    for _, form, proof in KINDS:
        pattern = form.replace("{x}", r"(?P<x>\w+)").replace("{r}", r"(?P<r>\w+ \d+)")
        if match := re.fullmatch(pattern, subtask):
            return re.match(proof.format(**match.groupdict()), feedback) is not None
    return False


def split(description: str, actions: list[str], observations: list[str]) -> list[tuple[str, int, int]]:
    """Groups (subtask, start, end); N actions, N + 1 observations. A group ends with the answer of its kind.

    Where two things belong together, a search must leave alone what is already in its place.
    """
    answers = [compact(obs.split(SEPARATOR)[0]) for obs in observations[1:]]
    targets = [m[1] for answer in answers if (m := re.match(r"You move \w+ \d+ to (\w+ \d+)", answer))]
    two = " two " in description and targets
    groups, start = [], 0
    for i, answer in enumerate(answers):
        for ending, form, _ in KINDS if two else KINDS[1:]:
            match = re.match(ending, answer)
            if match and not ("not from" in form and match["r"] == targets[0]):
                fill = match.groupdict() | ({"r": targets[0]} if "not from" in form else {})
                groups.append((form.format(**fill), start, i + 1))
                start = i + 1
                break
    if start < len(actions):
        groups.append(("try another action", start, len(actions)))
    seen = [description, *observations[:1]]
    groups = [("try another action" if unknown_names(g[0], *seen) else g[0], *g[1:]) for g in groups]
    return [
        (name, cut, min(cut + MAX_ACTIONS, end))
        for name, begin, end in groups
        for cut in range(begin, end, MAX_ACTIONS)
    ]
