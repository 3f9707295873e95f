"""The teacher: splits flat actions into subtasks, writes progress, judges completion; by rules or LLM.

GLIDER (arXiv:2505.19761) and STEP-HRL (arXiv:2604.05808, sec. 4) ask a large model. These rules need none;
their progress is a pure function of what the progress policy sees. The rules know ScienceWorld only.
What this file does not do: play, or train.
"""

import argparse
import copy
import json
import os
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from data import Episode, Segment, read_episodes
from prompts import NO_PROGRESS, compact, split_obs

MAX_ACTIONS = 12  # cap of one group; what takes longer goes on under the same name in the next group
INNER = ["art studio", "bedroom", "greenhouse", "kitchen", "living room", "workshop"]  # around the hallway
DOORS = {*(f"hallway {room}" for room in INNER)}
DOORS |= {"kitchen bathroom", "kitchen outside", "outside foundry", "outside greenhouse"}
ROOMS = [*INNER, "hallway", "bathroom", "outside", "foundry"]
ROOMS_AND_TOOLS = (
    frozenset(  # names that a subtask may use unseen: the same in every house, and the stages of life
        f"""{" ".join(ROOMS)} thermometer metal pot sink stove freezer blast furnace oven water stopwatch
    shovel soil jug recipe battery wire block egg hatchling juvenile adult baby seed seedling stage
    reproducing tadpole caterpillar pupa""".split()
    )
)
PLAIN_WORDS = frozenset(  # words that name no object, place or number
    """a action activated after again all already an and anode another approximately are around asked at
    away be been before both bottom broken by cathode celsius checked choose close closed complete
    completed connect connected container containers contents cool current deactivated degrees dig done
    door doors down drop dropped dug eight eleven empty examine examined explore fill filled find
    finished first five focus focused for found four from get go got happened has have heat heated here
    in inside into inventory is it its known last look looked made make measure measured measures mix
    mixed move moved next nine no none not nothing now number of off on once one open opened or other
    out pick picked place placed pour poured produce produced put read reading reads request result room
    saw see seen seven six start started still subtask take taken temperature ten terminal than that the
    then there this three ticks time times to try turn turned twelve two understood until up use used
    wait waited was watch water with yet""".split()
)
REFUSED = r"No known action|Unknown action"


def words(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?|[a-z]+", text.lower())


def unknown_names(text: str, *sources: str) -> list[str]:
    """The words of `text` that are neither plain nor in its sources; a plural counts as its singular."""
    known = PLAIN_WORDS | {w for source in sources for w in words(source)}
    return [w for w in words(text) if not {w, w.removesuffix("s"), w + "s"} & known]


def raw_parts(obs: str) -> list[str]:
    """Feedback, room and inventory as the world wrote them, but for a missing space of its own."""
    return (obs.replace("wireits", "wire its").split("\n\n") + ["", ""])[:3]


def room_of(obs: str) -> str:
    return (re.findall(r"is called (?:the )?([^.\n]+)\.", raw_parts(obs)[1]) or [""])[0]


# --- local progress ---------------------------------------------------------------------------------------
# Feedback and its sentence; first match wins. {a}: the action's object, {1} {2}: groups of the feedback.
OUTCOMES = [
    (r"^(?:The|A) ([\w ]+) appears broken", "The {1} is broken."),
    (r"^The door is (?:now|already) (\w+)", "The {a} is {1}."),
    (r"^The ([\w ]+) is (?:now|already) (\w+)", "The {1} is {2}."),
    (r"^You move to the ([\w ]+)", "In the {1}."),
    (r"You move the ([\w' -]+) to the inventory", "Got the {1}."),
    (r"You move the ([\w' -]+) to the ([\w ]+)", "The {1} is in the {2}."),
    (r"^You focus on the (.+)", "Focused on the {1}."),
    (r"measures a temperature of (-?\d+)", "Temperature: {1} degrees celsius."),
    (r"mix to produce ([\w -]+)", "Mixed to produce {1}."),
    (r"time reads (\d+) tick", "The stopwatch reads {1} ticks."),
    (r"([\w ]*block) approximately (\d+)%", "The {1} is {2}% down."),
    (r"([\w ]*block) at the bottom", "The {1} is at the bottom."),
    (r"^(.+?) is now connected to (.+)$", "Connected {1} to {2}."),
    (r"^You pour the contents of the ([\w -]+) into the ([\w ]+)", "Poured the {1} into the {2}."),
    (r"^The recipe reads:\W*To make ([\w ]+), you need to mix ([\w ,]+)", "To make {1}, mix {2}."),
    (r"^You dig", "Dug up soil."),
    (r"^Ambiguous request", "Asked to choose a number."),
    (r"can't move something into itself", "Nothing happened."),
    (REFUSED, "The action is not understood."),
]
# sentences of p_t that outlive the next action
KEPT = [r"Temperature: [^.]+\.", r"The \w+ is broken\.", r"Poured [^.]+\.", r"The stopwatch reads [^.]+\."]
NUMBERS = "two three four five six seven eight nine ten eleven twelve"
COUNTS = ["once", *(f"{number} times" for number in NUMBERS.split())]


def progress_text(subtask: str, previous: str, action: str, feedback: str) -> str:
    """p_{t+1} from (subtask, p_t, a_t, feedback) alone: what the action brought, and what survives of p_t."""
    feedback = " ".join(compact(feedback).split())
    new = " ".join(f"Saw {feedback}".split()[:10]) + "."
    if action.startswith("wait"):
        before = re.search(r"Waited (once|\w+ times)", previous)
        count = COUNTS.index(before[1]) + 1 if before and before[1] in COUNTS else 0
        new = f"Waited {COUNTS[min(count, len(COUNTS) - 1)]}."
    elif action == "look around":
        new = f"Looked around the {feedback.split(':')[0]}."
    elif found := [(m, text) for pattern, text in OUTCOMES if (m := re.search(pattern, feedback))]:
        match, new = found[0]
        values = {
            "a": re.sub(r"^(?:open|close|activate) ", "", action),
            **dict(zip("12", match.groups(), strict=False)),
        }
        new = re.sub(r"\{(\w)\}", lambda m: values[m[1]], new)
    kept = [m[0] for pattern in KEPT if (m := re.search(pattern, previous)) and not re.match(pattern, new)]
    return " ".join(kept[-1:] + [new])


# --- subtasks and their completion ------------------------------------------------------------------------
_OPEN = r"(?:open (?!door).+\n)*"
# a habit of the gold paths, without effect
_SELF = r"(?:pour (?:(?P<self>.+?) in(?:to)? (?P=self)|metal pot .* into metal pot.*)\n)?"
X, Y = "(?P<x>.+?)", "(?P<y>.+?)"
# Per kind: how the coming actions look (one a line, marked BROKEN or REFUSED), the subtask's name, and its
# completion: what the feedback says ({x}: a part of x), what a line of room or inventory shows. First wins.
# fmt: off
KINDS = [
    (r"(?:.+ REFUSED\n)+", "try another action", "(?!)", ""),
    (r"(?!)", "go to the {room}", "", ""),  # found by _walk
    (r"(?!)", "explore the {room}", "is called ", ""),
    (rf"(?:wait1\n)+(?=focus on {X}\n)", "wait for the {x}", "You decide to wait", "room {x}"),
    (r"(?:wait1\n)+(?:look around\n|$)", "wait and look around", "is called ", ""),
    (rf"{_SELF}wait1?\n", "wait", "You decide to wait", ""),
    (rf"examine {X}\nuse thermometer.+\nwait1?\n", "cool the {x}", "You decide to wait", ""),
    (rf"(?:examine {X}\n(?:use thermometer.+\n|$)|use thermometer in inventory on {Y}\n)",
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
    (rf"{_OPEN}move {X} to {Y}\nactivate (?P=y)(?: BROKEN)?\n", "heat the {x} with the {y}",
        "The {y} (?:is now activated|appears broken)", "room {y} on {x}"),
    (rf"{_OPEN}move {X} to {Y}\n(?:0\n)?", "put the {x} in the {y}",
        r"You move the {x} to the {y}\.", ""),
    (rf"{_SELF}(?:open (?!door).+\n|deactivate .+\n)*pick up {X}\n(?:0\n)?", "get the {x}",
        "You move the {x} to the inventory", "inventory {x}"),
    (rf"{_OPEN}focus on {X}\n(?:0\n)?", "focus on the {x}", r"You focus on the {x}\.", ""),
    (r"(?:connect .+\n)+", "connect {devices} with the {wires}",
        r"on {x} is now connected to .* on {y}\.?$", ""),
    (rf"{_SELF}{_OPEN}(?:examine .+\n)?mix {X}(?: containing .+)?\n", "mix the contents of the {x}",
        " mix to produce ", ""),
    (rf"{_SELF}{_OPEN}pour {X} in(?:to)? {Y}\n(?:0\n)?",
        "pour the {x} into the {y}", r"You pour the contents of the [\w ]+ into the {y}\.", ""),
    (rf"(?:close door.+\n)+open {X}\n", "close the doors and open the {x}",
        "The {x} is (?:now|already) open", ""),
    (rf"drop {X}\n", "drop the {x}", r"You move the {x} to the {here}\.", ""),
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
    feedback, room, inventory = raw_parts(obs)
    for _, name, said, shown in KINDS:
        name = name.replace("{carry}", "(?:, .*)?")
        name, said = (re.sub(r"\{(\w+)\}", r"(?P<\1>[\\w' (),-]+?)", text) for text in (name, said))
        if not (match := re.fullmatch(name, subtask)):
            continue
        goal, here = match.groupdict(), room_of(obs)
        if not (answer := re.search(said, feedback)) or goal.get("room", here) != here:
            return False
        if "wires" in goal:  # the last link joins the last device and the last wire
            colour = goal["wires"].removesuffix(" wires").split(" and ")[-1]
            return {*answer.groups()} == {re.split(" and |^the ", goal["devices"])[-1], f"{colour} wire"}
        goal["here"] = here
        if any(
            part and not set(words(part)) <= set(words(goal[k])) for k, part in answer.groupdict().items()
        ):
            return False
        where, _, wanted = shown.format_map(goal).partition(" ")
        lines = {"room": room, "inventory": inventory}.get(where, "").split("\n")
        return "appears broken" in feedback or any({*words(wanted)} <= {*words(line)} for line in lines)
    return False


DISTANCE = {(a, b): 1 if {f"{a} {b}", f"{b} {a}"} & DOORS else 9 * (a != b) for a in ROOMS for b in ROOMS}
for via in ROOMS:  # Floyd-Warshall
    DISTANCE = {(a, b): min(d, DISTANCE[a, via] + DISTANCE[via, b]) for (a, b), d in DISTANCE.items()}


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


def shown_name(name: str, obs: str) -> str:
    """`name` as the observation lists it: "butterfly" -> "butterfly egg", "plane b" -> "plane B"."""
    text = re.sub(r" titled [^\n,]*", "", "\n".join(reversed(raw_parts(obs)[1:])))
    ends = r"(?=,| \(|\)|\.|\n| in the (?!\w+ stage)|$)"
    items = re.findall(r"(?:\b[Aa]n?|\bthe|\bcalled) (?!substance called)([\w' -]+?)" + ends, text)
    same = [i for i in items if i.lower() == name.lower()]
    return " ".join((same + [i for i in items if {*words(name)} <= {*words(i)}] + [name])[0].split())


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


def _names(match: re.Match, feedbacks: list[str], i: int, obs: str) -> dict[str, str]:
    """What fills the name of the group matched at i; the world's words come before the gold path's."""
    groups = {k: v for k, v in match.groupdict().items() if v}
    fill = {k: _referent(v, obs) for k, v in groups.items()}
    fill.setdefault("x", fill.get("y", ""))
    said = "\n".join(feedbacks[i : i + match[0].count("\n") + match[0].startswith("wait1")])
    if found := re.search(r"You focus on the ([^\n]+)", said):
        stage = re.search(r" in the \w+ stage", groups.get("x", ""))
        fill["x"] = found[1] + (stage[0] if stage else "")
    elif found := re.search(r"You move the ([\w' -]+) to the ([\w -]+)", said):
        held = re.search(
            r"pick up .*(?:cup|metal pot)( containing (?!nothing)[\w ]+?)(?: in |$)", match[0].strip()
        )
        fill["x"] = shown_name(found[1], obs) + (held[1] if held else "")
        fill |= {} if "inclined" in found[2] else {"y": found[2]}
    elif found := re.search(r"You pour the contents of the ([\w -]+) into the ([\w -]+)", said):
        fill |= {"y": found[2]} | ({} if "containing" in groups.get("x", "") else {"x": found[1]})
    links = re.findall(r"on ([\w -]+) is now connected to .* on ([\w -]+)", said)
    parts = dict.fromkeys(name for link in links for name in link)
    fill["devices"] = "the " + _and([p for p in parts if not p.endswith(" wire")])
    fill["wires"] = _and([p.removesuffix(" wire") for p in parts if p.endswith(" wire")]) + " wires"
    fill["pots"] = _and(list(dict.fromkeys(re.findall(r"into the ([\w ]+)", said))))
    ticks = re.findall(r"reads (\d+) ticks", "\n".join(feedbacks[:i]))
    fill["carry"] = f", {ticks[-1]} ticks on the other" if ticks else ""
    return fill


def split(description: str, actions: list[str], observations: list[str]) -> list[tuple[str, int, int]]:
    """[(subtask, start, end)]: groups of at most MAX_ACTIONS; N actions, N + 1 observations."""
    feedbacks, lines, refused = [split_obs(obs)[0] for obs in observations[1:]], [], True
    for action, feedback in zip(reversed(actions), reversed(feedbacks), strict=True):
        asked = feedback.startswith("Ambiguous")  # a question that gets no good answer is refused too
        refused = bool(re.match(REFUSED, feedback)) or asked and refused
        lines.insert(0, action + (" BROKEN" if "appears broken" in feedback else " REFUSED" * refused) + "\n")
    groups, i = [], 0
    while i < len(actions):
        end, name = _walk(actions, observations, i)
        if end == i:
            text, end, name = "".join(lines[i:]), i + 1, "try another action"
            if found := [(m, form) for look, form, _, _ in KINDS if (m := re.match(look, text))]:
                match, form = found[0]
                end, name = (
                    i + match[0].count("\n"),
                    form.format_map(_names(match, feedbacks, i, observations[i])),
                )
            seen = [
                description,
                observations[i],
                *ROOMS_AND_TOOLS,
                *feedbacks[i - 1 : i],
                *(g[0] for g in groups),
            ]
            if unknown_names(name, *seen):  # no planner could find this name
                name = "try another action"
        groups += [(name, start, min(start + MAX_ACTIONS, end)) for start in range(i, end, MAX_ACTIONS)]
        i = end
    return groups


# --- episodes ---------------------------------------------------------------------------------------------
def fill_in(episode: Episode, groups: list[tuple[str, int, int]], write=progress_text) -> Episode:
    """A new episode with these subtasks, and progress by write(subtask, previous, action, feedback)."""
    new = copy.deepcopy(episode)
    new.segments = []
    for subtask, start, end in groups:
        progress = NO_PROGRESS
        for i in range(start, end):
            turn, verdict = new.turns[i], judge(subtask, new.obs_after(i))
            turn.subtask, turn.progress, turn.claimed_done, turn.verified_done = (
                subtask,
                progress,
                i == end - 1,
                verdict,
            )
            progress = write(subtask, progress, turn.action, split_obs(new.obs_after(i))[0])
        new.segments.append(Segment(subtask, start, end, progress))
    return new


def annotate(episode: Episode, teacher: "ChatTeacher | None" = None) -> Episode:
    """A new episode with subtasks, progress, segments and verdicts, by these rules or by `teacher`."""
    ended = [i for i, turn in enumerate(episode.turns) if turn.terminated]
    if ended:  # what follows completion is dropped
        turns, final_obs = episode.turns[: ended[0] + 1], episode.obs_after(ended[0])
        episode = replace(episode, turns=turns, final_obs=final_obs, segments=[])
    if teacher:
        return teacher.annotate(episode)
    observations = [turn.obs for turn in episode.turns] + [episode.final_obs]
    return fill_in(episode, split(episode.description, [turn.action for turn in episode.turns], observations))


def check(episode: Episode, rules: bool = True) -> list[str]:
    """All problems of one annotated episode. rules=False: progress need only pass the name test."""
    problems, covered, handed_over = [], 0, NO_PROGRESS
    names = [s.subtask for s in episode.segments]
    for s, segment in enumerate(episode.segments):
        name, start, end, found, progress = segment.subtask, segment.start, segment.end, [], NO_PROGRESS
        if start != covered or not 1 <= end - start <= MAX_ACTIONS or end > len(episode.turns):
            wrong = f"turns {start}-{end} do not follow turn {covered} with 1 to {MAX_ACTIONS} actions"
            return [*problems, f"{episode.id} segment {s} {name!r}: {wrong}"]
        seen = [episode.description, handed_over, episode.turns[start].obs, *names[:s], *ROOMS_AND_TOOLS]
        if unknown := unknown_names(name, *seen):
            found.append(f"the planner has not seen {unknown}")
        for i, turn in enumerate(episode.turns[start:end], start):
            last, verdict = i == end - 1, judge(name, episode.obs_after(i))
            labels = (name, progress, last, verdict)
            if (turn.subtask, turn.progress, turn.claimed_done, turn.verified_done) != labels:
                found.append(f"turn {i} does not carry its subtask, progress, claim and verdict {labels}")
            feedback = split_obs(episode.obs_after(i))[0]
            text = segment.final_progress if last else episode.turns[i + 1].progress
            if rules and text != progress_text(name, progress, turn.action, feedback):
                found.append(f"progress after turn {i} is {text!r}, not progress_text of its inputs")
            if unknown := unknown_names(text, name, progress, turn.action, feedback):
                found.append(f"progress after turn {i} names {unknown}, which are not in its inputs")
            if verdict and not last:
                found.append(f"complete already after turn {i}")
            progress = text
        cut = names[s + 1 : s + 2] in ([], [name])  # by the end of the episode, or by the cap
        if not verdict and not cut and name != "try another action":
            found.append(f"not complete at its end: {feedback!r}")
        problems += [f"{episode.id} segment {s} {name!r}: {text}" for text in found]
        covered, handed_over = end, progress
    if covered != len(episode.turns):
        problems.append(f"{episode.id}: the segments cover {covered} of {len(episode.turns)} turns")
    return problems


# --- how learnable the labels are -------------------------------------------------------------------------
def ambiguity(episodes: list[Episode], level: str) -> float:
    """Share of answers unlike the majority's to the same prompt: what no executor (or planner) can learn."""
    answers = defaultdict(Counter)
    for episode in episodes:
        for turn in episode.turns if level == "executor" else []:
            answers[turn.subtask, turn.progress, compact(turn.obs)][turn.action] += 1
        finished, progress = (), NO_PROGRESS
        for segment in episode.segments if level == "planner" else []:
            obs = compact(episode.turns[segment.start].obs)
            answers[episode.description, finished, progress, obs][segment.subtask] += 1
            finished, progress = (*finished, segment.subtask), segment.final_progress
    return 1 - sum(max(c.values()) for c in answers.values()) / sum(c.total() for c in answers.values())


def leaks(episodes: list[Episode]) -> list[str]:
    """Where one past (task, observations, actions, subtasks) has two texts of progress: a look ahead."""
    first, problems = {}, []
    for episode in episodes:
        past = episode.description
        for i, turn in enumerate(episode.turns):
            past = hash((past, turn.obs, turn.subtask))
            if first.setdefault(past, turn.progress) != turn.progress:
                problems.append(
                    f"{episode.id} turn {i}: {turn.progress!r} and {first[past]!r} after the same past"
                )
            past = hash((past, turn.action))
    return problems


# --- another teacher --------------------------------------------------------------------------------------
SPLIT_PROMPT = """An expert solved a task in a text world. Divide its actions, in order, into subtasks.
Task: {description}
First observation: {obs}
Actions, each with the answer of the world:
{steps}

Answer with a JSON list only: [{{"subtask": "...", "actions": 3}}, ...]. Each takes 1 to {cap} actions,
together {count}.
Name only things that the task or an earlier observation mentions. Use these forms, which can be verified:
{forms}. {complaint}"""
PROGRESS_PROMPT = """You keep the notes of an agent at work on one subtask. Rewrite them after its latest
action, in one or two short sentences of at most 25 words: what is done, and any reading or result. Mention
nothing that is not written here, and no plans.
Subtask: {}
Notes so far: {}
Action: {}
Answer of the world: {}
Notes:"""


@dataclass(frozen=True)
class ChatTeacher:
    """Any server with an OpenAI-compatible /chat/completions; labels that fail `check` raise ValueError."""

    url: str  # e.g. http://localhost:8000/v1
    model: str
    timeout: float = 60.0  # seconds per request
    attempts: int = 3  # per request, and per episode

    def ask(self, prompt: str) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for _ in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)["choices"][0]["message"]["content"].strip()
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as caught:
                error = caught
        raise ConnectionError(
            f"no answer from {url} ({error}): start the server, or correct url, model or OPENAI_API_KEY"
        )

    def groups(self, episode: Episode, complaint: str) -> list[tuple[str, int, int]]:
        """The subtask groups of one answer; ValueError when it is not of the form asked for."""
        steps = [f"{t.action} -> {split_obs(episode.obs_after(i))[0]}" for i, t in enumerate(episode.turns)]
        texts = dict(
            description=episode.description, obs=compact(episode.turns[0].obs), steps="\n".join(steps)
        )
        limits = dict(count=len(steps), cap=MAX_ACTIONS, forms=FORMS, complaint=complaint)
        answer = self.ask(SPLIT_PROMPT.format(**texts, **limits))
        groups = []
        try:
            for part in json.loads(answer[answer.index("[") : answer.rindex("]") + 1]):
                start = groups[-1][2] if groups else 0
                groups.append((str(part["subtask"]), start, start + int(part["actions"])))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"not the JSON list asked for ({error}): {answer[:80]!r}") from None
        if not groups or groups[-1][2] != len(steps) or any(not 0 < end - start for _, start, end in groups):
            raise ValueError(
                f"groups that end at {[g[2] for g in groups]}: they must take all {len(steps)} actions"
            )
        return groups

    def annotate(self, episode: Episode) -> Episode:
        problem = ""
        for _ in range(self.attempts):
            try:
                groups = self.groups(episode, problem and f"Your last answer was refused: {problem}")
                new = fill_in(episode, groups, lambda *inputs: self.ask(PROGRESS_PROMPT.format(*inputs)))
                problem = (check(new, rules=False) or [""])[0]
            except ValueError as error:
                problem = str(error)
            if not problem:
                return new
        raise ValueError(
            f"{self.model} gave no valid labels for {episode.id} in {self.attempts} attempts: {problem}"
        )


# --- command line -----------------------------------------------------------------------------------------
def report(episodes: list[Episode]) -> int:
    """Prints a row per task type (mean/max words, ambiguities); returns the number of problems."""
    titles = ("episodes", "problems", "name words", "subtasks", "note words", "judged", "executor", "planner")
    print(f"{'task':48}" + "".join(f"{title:>11}" for title in titles))
    for task in [*sorted({e.task for e in episodes}), "all"]:
        group = [e for e in episodes if task in (e.task, "all")]
        problems = [p for e in group for p in check(e)] + leaks(group)
        ends = [e.turns[s.end - 1].verified_done for e in group for s in e.segments]
        names = [len(s.subtask.split()) for e in group for s in e.segments]
        notes = [len(t.progress.split()) for e in group for t in e.turns]
        row = [str(len(group)), str(len(problems)), f"{sum(names) / len(names):.1f}/{max(names)}"]
        row += [f"{len(names) / len(group):.1f}", f"{sum(notes) / len(notes):.1f}/{max(notes)}"]
        row += [
            f"{x:.2%}"
            for x in (sum(ends) / len(ends), ambiguity(group, "executor"), ambiguity(group, "planner"))
        ]
        print(f"{task:48}" + "".join(f"{cell:>11}" for cell in row))
        for problem in problems[:3] if task != "all" else []:
            print(f"  {problem}", file=sys.stderr)
    return len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Annotate episodes by rules and report how good the labels are."
    )
    parser.add_argument("files", nargs="+", help="episodes as JSONL, raw or annotated")
    files = parser.parse_args().files
    sys.exit(bool(report([annotate(episode) for file in files for episode in read_episodes(file)])))


if __name__ == "__main__":
    main()
