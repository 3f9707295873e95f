"""Every prompt as text, beside the parser of its answer; one builder serves training and acting.

Three roles on one backbone, told apart by the first words of the prompt (STEP-HRL, arXiv:2604.05808, sec. 3):
    planner   g_k ~ pi^h(. | task, finished subtasks, final progress, obs)
    executor  (a_t, done_t) ~ pi^l(. | subtask, progress, obs)
    progress  p_{t+1} ~ pi^p(. | subtask, progress, a_t, feedback)
What an answer follows from most stands last: a small model reads it sooner there.
"""

import re

SEPARATOR = "\n\n"  # envs.OBS_SEPARATOR: feedback, room, inventory
NO_PROGRESS = "None"
NOT_UNDERSTOOD = (
    "No known action matches that input",
    "Unknown action",
    "Nothing happens",
)  # what the worlds say to an invalid action
# and to one that changes nothing
IN_VAIN = r"^The door is not open|^It's not clear how to get there|is already (?:open|connected)"


def refused(obs: str) -> bool:
    """Whether the last action did nothing: it was not understood, or in vain."""
    return obs.startswith(NOT_UNDERSTOOD) or bool(re.search(IN_VAIN, obs.split(SEPARATOR)[0]))


# --- observations ---------------------------------------------------------------------------------------
def split_obs(obs: str) -> tuple[str, str, str]:
    """A raw observation as (feedback of the last action, room, inventory), each compacted for the prompt."""
    feedback, room, inventory = (obs.split(SEPARATOR) + ["", ""])[:3]
    return compact(feedback), compact(room), compact(inventory)


_RULES = [
    (r"\n\t(?:the agent|a substance called air)(?=\n|$)", ""),  # in every room, says nothing
    (r"(?:This room|This outside location) is called (?:the )?([^.]*)\. (?:In it|Here),? you see: ?", r"\1:"),
    (r"In your inventory, you see: ?", "inventory:"),
    (r"\nYou also see:", "\ndoors:"),
    (r"A door to the ([\w ]+) \(that is (open|closed)\)", r"\1 \2"),
    (r",? which (?:is|are) (?:turned )?(on|off|activated|deactivated|open|closed)\b", r" \1"),
    (r"\. The [\w ]+ door is (open|closed)\.", r" \1."),
    (r"\. (?:On|In) the [\w ]+ is: nothing\.", ""),
    (r"\. (?:On|In) the [\w ]+ is: ", " with "),
    (r", currently reading a temperature of (-?\d+) degrees celsius", r" reading \1 degrees"),
    (r"containing nothing", "empty"),
    (r"a substance called ", ""),
    (r"((?:^|[:,\t(]|\bwith|containing) ?)(?:an?|the|A) (?=\w)", r"\1"),
    (r"\. ?(?=[.\n]|$)", ""),
    (r"\s*\n\t", "; "),
    (r":; ", ": "),
    (r"\s*\n+", ". "),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def _room(match: re.Match) -> str:
    """ALFWorld's list of receptacles: "a drawer 2, a drawer 1, and a safe 1" -> "room: drawer 2, safe 1"."""
    highest = {}
    for kind, number in re.findall(r"\ba (\w+) (\d+)", match[1]):
        highest[kind] = max(int(number), highest.get(kind, 0))
    return "room: " + ", ".join(f"{kind} {number}" for kind, number in highest.items())


_ALFWORLD = [
    (r"You are in the middle of a room\. Looking quickly around you, you see ([^.]*)\.?", _room),
    (r"You (?:arrive at|open) [\w ]+\. (?=The|On the)", ""),
    (r"(?:On the ([\w ]+)|The ([\w ]+) is open\. In it), you see ", r"\1\2: "),
    (r"You are not carrying anything", "carrying nothing"),
    (r"You are carrying: ", "carrying "),
    (r"\b(?:and )?(?:[Tt]he|a) (?=\w+ \d)", ""),
]
_ALFWORLD = [(re.compile(pattern), replacement) for pattern, replacement in _ALFWORLD]


def compact(text: str) -> str:
    """A world's text without its fixed phrases: 138 words of a room become 60, no object is lost."""
    for pattern, replacement in _ALFWORLD if re.search(r"[a-z] \d+\b|carrying", text) else []:
        text = pattern.sub(replacement, text)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip(" .,")


def render(obs: str) -> str:
    """The observation block of the planner and the executor: last feedback, room, inventory."""
    feedback, room, inventory = split_obs(obs)
    return ". ".join(part for part in ("" if feedback == room else feedback, room, inventory) if part)


# --- the three roles ------------------------------------------------------------------------------------
def planner(description: str, memory: str, obs: str) -> str:
    """State of pi^h; `memory` (progress.py) tells what happened so far."""
    return (
        f"Plan the next subtask.\nObservation: {render(obs)}\n"
        f"Task: {compact(description)}\n{memory}\nSubtask:"
    )


def executor(subtask: str, memory: str, obs: str) -> str:
    """State of pi^l. It never sees the task, so skills carry over between tasks."""
    return (
        f"Act on the subtask and say if it is then done.\nObservation: {render(obs)}\n{memory}\n"
        f"Subtask: {subtask}\nAction:"
    )


def progress(subtask: str, previous: str, action: str, feedback: str) -> str:
    """State of pi^p: what the last action brought is folded into the previous local progress."""
    return (
        f"Update the progress of the subtask.\nSubtask: {subtask}\nProgress: {previous}\n"
        f"Action: {action}\nResult: {compact(feedback)}\nProgress:"
    )


def plan_execute(description: str, finished: str, goal: str, done: str, obs: str) -> str:
    """State of HiPER's one policy: it keeps or switches the subgoal `goal`, then acts  (plan_execute.py)."""
    return (
        f"Keep or switch the goal, then act.\nTask: {compact(description)}\nFinished: {finished}\n"
        f"Goal: {goal}\nDone: {done}\nObservation: {render(obs)}\nSwitch:"
    )


# --- the answers ----------------------------------------------------------------------------------------
def executor_answer(action: str, done: bool) -> str:
    return f" {action}; {done}"


def parse_executor(text: str) -> tuple[str, bool, bool]:
    """'<action>; True|False' -> (action, claimed_done, parsed). Any other form is played as it is."""
    match = re.fullmatch(r"\s*(.*?)\s*;\s*(true|false)\s*", text, flags=re.IGNORECASE | re.DOTALL)
    if match is None or not match[1]:
        return text.strip() or "none", False, False
    return match[1], match[2].lower() == "true", True
