"""Players without a model: the gold path, the same with stumbles, exploration, random valid actions.

What this file does not do: annotate what was played.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby

import prompts
from data import Episode, Segment, Turn
from envs import EnvPool, StepResult
from hierarchy import episode_seed
from scienceworld_rules import DISTANCE, room_of

# Exploration: template -> weight; A is a thing in view, I a thing held. A wrong `focus on` ends the episode,
# so that only practice makes one, seldom.
TEMPLATES = {
    "go": 8, "look around": 2, "pick up A": 6, "put down I": 1, "open A": 3, "close A": 1, "activate A": 3,
    "deactivate A": 2, "look at A": 2, "look in A": 2, "examine A": 2, "move I to A": 3, "move A to A": 1,
    "pour I into A": 2, "pour A into A": 1, "use I on A": 2, "mix A": 2, "connect A to A": 1,
    "dunk I into A": 1, "read A": 1, "wait1": 1, "wait": 0.5, "inventory": 0.5,
}  # fmt: skip


THINGS = ("fridge", "freezer", "glass jar", "oven", "drawer in counter", "drawer in cupboard")
SEARCHED = [f"open {thing}" for thing in THINGS]  # in search of something, likeliest first


def play(
    pool: EnvPool,
    panel: list[tuple[str, int | str]],
    env: str,
    source: str,
    choose: Callable,
    look_up: str = "",
    path: str = "",
) -> Iterator[Episode]:
    """Plays `panel` in lockstep and yields episodes as they end.

    choose(episode so far, now, extra) -> action, or None to stop.
    extra: the answer of the world's method `look_up` before each action, or of `path` before the episode.
    """
    waiting, running, extra = list(reversed(panel)), {}, {}
    while waiting or running:
        free = [slot for slot in range(pool.size) if slot not in running][: len(waiting)]
        starts = {slot: waiting.pop() for slot in free}
        if path:
            extra |= pool.call({slot: (path, *episode) for slot, episode in starts.items()})
        for slot, now in pool.call({slot: ("reset", *episode) for slot, episode in starts.items()}).items():
            running[slot] = (Episode(env, *starts[slot], now.description, source=source), now)
        if look_up:
            extra = pool.call({slot: (look_up,) for slot in running})
        actions = {slot: choose(*running[slot], extra.get(slot)) for slot in sorted(running)}
        results = pool.call(
            {slot: ("step", action) for slot, action in actions.items() if action is not None}
        )
        for slot in sorted(running):
            episode, now = running[slot]
            if slot in results:
                after: StepResult = results[slot]
                episode.turns.append(
                    Turn(now.obs, actions[slot], "", after.reward, after.terminated, after.truncated)
                )
                running[slot] = (episode, now := after)
            if slot not in results or now.terminated or now.truncated:
                episode.final_obs, episode.score, episode.success = now.obs, now.score, now.success
                yield running.pop(slot)[0]


def doors(obs: str) -> dict[str, str]:
    """Rooms behind the doors in view: "open" or "closed"."""
    return dict(
        re.findall(r"(\w[\w ]*) (open|closed)(?:;|$)", prompts.split_obs(obs)[1].partition("doors: ")[2])
    )


def without_detours(path: list[str]) -> list[str]:
    """Every walk as its last "go to", and one look around a room: ScienceWorld's gold paths stroll and stare.

    They stroll through rooms before the right one, and look twice at what every observation shows. A look
    after a wait stays: it is to see what the time has done.
    """
    kept, looked = [], False
    for action in path:
        if action.startswith("go to "):
            looked = False
            while kept and kept[-1].startswith(("go to ", "open door to ")):
                kept.pop()
        if action == "look around":
            if looked and not kept[-1].startswith("wait"):
                continue
            looked = True
        kept.append(action)
    return kept


def in_order(path: list[str]) -> list[str]:
    """What is opened in search of something, always in one order, until it is found (then nobody walks on).

    Gold's order is another every time; who cannot foresee it says the likeliest again and again.
    """
    groups, kept = [(known, list(run)) for known, run in groupby(path, SEARCHED.__contains__)], []
    for (known, run), (_, after) in zip(groups, [*groups[1:], (False, ["go to "])], strict=True):
        if known and (len(run) > 1 or after[0].startswith("focus on ")):
            found = not after[0].startswith(("go to ", "open door to "))
            run = SEARCHED[: SEARCHED.index(run[-1]) + 1] if found else sorted(run, key=SEARCHED.index)
        kept += run
    return kept


def without_idling(path: list[str], measures: bool) -> list[str]:
    """Time passes in waits of ten ticks, a garden is watered twice, and a look at the thermometer is enough.

    ScienceWorld's experts wait tick by tick, water four times, and examine and measure until it boils;
    measures: the task asks them to. Before a last `focus on`, else at the end, three more waits: what is
    waited for may need them, or the episode is over before.
    """
    kept, waterings, looks, end = [], 0, 0, len(path)
    while end and (path[end - 1].isdigit() or path[end - 1].startswith(("wait", "look around"))):
        end -= 1
    last = path[end - 1 : end] if end and path[end - 1].startswith("focus on ") else []
    for action, run in groupby(path[: end - 1] if last else path):
        times, waiting = len(list(run)), kept[-1:] == ["wait"]
        waterings += action == "activate sink"
        if waterings > 2 and (action.endswith(" sink") or action.startswith("pour jug into ")):
            continue
        if waiting and action == "look around":  # every observation shows the room
            continue
        looks = looks + 1 if action.startswith(("examine ", "use thermometer ")) and not measures else 0
        if looks and (waiting or looks > 2):
            kept += ["wait"] * (looks % 10 == 3)  # a tick each
        else:
            kept += ["wait"] if action == "wait1" and times > 2 else [action] * times
    return kept + ["wait"] * 3 * ("wait" in kept) + last


def play_gold(pool: EnvPool, panel: list, env: str, expert: str = "gold") -> Iterator[Episode]:
    """Replays an expert's solutions; actions after completion are dropped, the episode being over.

    expert: "gold" is the simulator's own path in ScienceWorld, the searching expert's in ALFWorld, which has
    "oracle" and "recorded" besides. ScienceWorld's goes the shortest way and waits as little as it can: what
    then fails is played with all its waits, and what fails again as it is.
    """

    def choose(episode: Episode, now: StepResult, path: list[str]) -> str | None:
        return path[len(episode.turns)] if len(episode.turns) < len(path) else None

    def choose_way(episode: Episode, now: StepResult, path: list[str]) -> str | None:
        plan = in_order(without_detours(path))
        if hasty:
            plan = without_idling(plan, bool(re.search("measure|temperature", episode.description)))
        left = plans.setdefault((episode.task, episode.variation, hasty), plan)
        if left and left[0] == f"go to {room_of(now.obs)}":
            left.pop(0)
        if now.obs.startswith("Ambiguous request") and not (left and left[0].isdigit()):
            return "0"
        if not left or len(episode.turns) >= len(path) + len(SEARCHED):  # a door does not open
            return None
        if not left[0].startswith("go to "):  # the paths name what is held at length, and only this in short
            action = left.pop(0).replace(" in inventory", "")
            return re.sub(r"(?<!electric )\bbuzzer$", "electric buzzer", action)
        ways, goal = doors(now.obs), left[0].removeprefix("go to ")
        room = min(ways, key=lambda room: DISTANCE.get((room, goal), 9), default=goal)
        return f"go to {room}" if ways.get(room) == "open" else f"open door to {room}"

    if expert != "gold" and not env.startswith("alfworld"):
        raise ValueError(f"{env} has no {expert!r} paths, ALFWorld has: use 'gold'")
    plans, source = {}, "expert" if expert == "gold" else expert
    for hasty in (True, False) if env == "scienceworld" else ():  # noqa: B007 - choose_way reads it
        failed = []
        for e in play(pool, panel, env, source, choose_way, path="gold_path"):
            if e.success or any(t.truncated for t in e.turns):
                yield e
            else:
                failed.append((e.task, e.variation))
        panel = failed
    yield from play(pool, panel, env, source, choose, path=f"{expert}_path")


def with_slips(gold: Episode, tries: float, slips: float, rng: random.Random) -> list[tuple[str, list]]:
    """An annotated path as (subtask, [(action, is it a slip?), ...]), with slips between.

    While a coin of `tries` says so, the last subtask or one of the four to come is tried out of turn: one
    slip, a part of its own. And before an action, with the probability `slips`, the action before it is made
    again, or the next of its subtask too early.
    """
    parts, last = [], ""
    for k, segment in enumerate(gold.segments):
        near = gold.segments[max(0, k - 1) : k] + gold.segments[k + 1 : k + 5]
        others = [s for s in near if s.subtask != segment.subtask]
        while others and rng.random() < tries:
            other = rng.choice(others)
            parts.append((other.subtask, [(gold.turns[other.end - 1].action, True)]))
        actions, part = [t.action for t in gold.turns[segment.start : segment.end]], []
        for i, action in enumerate(actions):
            wrong = [a for a in (last, *actions[i + 1 : i + 2]) if a not in ("", action)]
            if wrong and rng.random() < slips:
                part.append((rng.choice(wrong), True))
            part.append((action, False))
            last = action
        parts.append((segment.subtask, part))
    return parts


def play_stumbling(
    pool: EnvPool,
    gold: list[Episode],
    env: str,
    seed: int,
    judge: Callable[[str, str], bool],
    tries: float = 0.4,
    slips: float = 0.1,
) -> Iterator[Episode]:
    """Gold paths with slips in them, so that it can be learned what to do after one (with segments).

    An expert does not fail, so who imitates it alone says again and again what was refused. Noise in the
    expert's actions shows how it recovers (DART, arXiv:1703.09327). A slip that the world did not refuse, or
    that completed its subtask, is none: it is taken out, and the path played again.
    """
    plans = {
        (e.task, e.variation): with_slips(
            e, tries, slips, random.Random(episode_seed(seed, e.task, e.variation, 0, "stumble"))
        )
        for e in gold
    }

    def choose(episode: Episode, now: StepResult, _) -> str | None:
        actions = [action for _, part in plans[episode.task, episode.variation] for action, _ in part]
        return actions[len(episode.turns)] if len(episode.turns) < len(actions) else None

    while plans:
        for e in play(pool, list(plans), env, f"stumble-{seed}", choose):
            plan, after = plans.pop((e.task, e.variation)), [t.obs for t in e.turns[1:]] + [e.final_obs]
            feedback, kept = iter(after), []
            for subtask, part in plan:
                obs = [next(feedback, None) for _ in part]  # None: the episode was over
                fine = [
                    not slip or o is None or (prompts.refused(o) and not judge(subtask, o))
                    for (_, slip), o in zip(part, obs, strict=True)
                ]
                kept.append((subtask, [step for step, ok in zip(part, fine, strict=True) if ok]))
            if kept != plan:
                plans[e.task, e.variation] = [(subtask, part) for subtask, part in kept if part]
                continue
            ends = list(accumulate(len(part) for _, part in plan))
            segments = [
                Segment(subtask, end - len(part), min(end, len(e.turns)), "")
                for (subtask, part), end in zip(plan, ends, strict=True)
                if end - len(part) < len(e.turns)
            ]
            yield replace(e, segments=segments)


def play_random(pool: EnvPool, panel: list, env: str, seed: int) -> Iterator[Episode]:
    """Uniform over the valid actions of the moment (slow: the simulator lists them all)."""

    def choose(episode: Episode, now: StepResult, valid: list[str]) -> str:
        return random.Random(
            episode_seed(seed, episode.task, episode.variation, len(episode.turns), "random")
        ).choice(valid)

    return play(pool, panel, env, f"random-{seed}", choose, look_up="valid_actions")


def visible_names(text: str) -> list[str]:
    """Names of the things in a compacted room or inventory, states left out."""
    parts = re.split(r"[;,()]| with |containing |: ", text.split(". doors:")[0].partition(": ")[2])
    states = (
        r"\b(nothing|on|off|open|closed|empty|activated|deactivated|reading -?\d+ degrees|disconnected)\b.*"
    )
    return [name for part in parts if (name := re.sub(states, "", part).strip(" ."))]


# The same for ALFWorld, over what is admissible; one in ten gets another last word, and is seldom understood.
VERBS = {"go": 6, "open": 5, "take": 6, "move": 3, "clean": 3, "heat": 3, "cool": 3, "use": 3, "examine": 1}


def play_explore_admissible(
    pool: EnvPool, panel: list, env: str, seed: int, source: str
) -> Iterator[Episode]:
    """play_explore where the world lists its admissible commands cheaply (ALFWorld)."""

    def choose(episode: Episode, now: StepResult, valid: list[str]) -> str:
        rng = random.Random(
            episode_seed(seed, episode.task, episode.variation, len(episode.turns), "explore")
        )
        verbs = [command.split()[0] for command in valid]
        chances = [VERBS.get(verb, 0.3) / verbs.count(verb) for verb in verbs]
        action = rng.choices(valid, chances)[0]
        if rng.random() < 0.1:
            words = " ".join(valid).split()
            action = re.sub(r"\w+ \d+$", f"{rng.choice(words)} {rng.randint(1, 4)}", action)
        return action

    return play(pool, panel, env, source, choose, look_up="valid_actions")


def play_explore(pool: EnvPool, panel: list, env: str, seed: int, practice=False) -> Iterator[Episode]:
    """Random actions on things in view: text about the world without any gold action.

    practice: who opened a door mostly goes through it, who went through one often goes on to the next room,
    and who opened something else mostly takes what it held; a question of the world's is answered, and what
    ends most episodes is a focus.
    """
    source = f"{'practice' if practice else 'explore'}-{seed}"
    if env.startswith("alfworld"):
        return play_explore_admissible(pool, panel, env, seed, source)

    def choose(episode: Episode, now: StepResult, _) -> str:
        rng = random.Random(
            episode_seed(seed, episode.task, episode.variation, len(episode.turns), "explore")
        )
        _, room, inventory = prompts.split_obs(now.obs)
        held = visible_names(inventory)
        names = visible_names(room) + held or ["air"]
        if practice and now.obs.startswith("Ambiguous"):
            return "0"
        if practice and len(episode.turns) > 0.75 * pool.max_steps and rng.random() < 0.3:
            return f"focus on {rng.choice(names)}"
        template = rng.choices(list(TEMPLATES), list(TEMPLATES.values()))[0]
        ways = list(doors(now.obs).items())
        if practice and episode.turns and rng.random() < 0.6:
            before = episode.turns[-1]
            opened = before.action.removeprefix("open door to ")
            if (opened, "open") in ways and opened != before.action:
                return f"go to {opened}"
            seen = prompts.split_obs(before.obs)[1]
            if before.action.startswith("open ") and (
                found := [n for n in names if n not in visible_names(seen)]
            ):
                return f"pick up {rng.choice(found)}"
            came_from = seen.partition(":")[0]
            if before.action.startswith("go to ") and len(ways) > 1:
                template, ways = "go", [way for way in ways if way[0] != came_from]
        if template == "go":
            if not ways:
                return "look around"
            door, state = rng.choice(ways)
            return f"go to {door}" if state == "open" else f"open door to {door}"
        shut = re.findall(r"(?:[:;,]|with) ([\w ]+?)(?: on| off)? closed", room.partition("doors: ")[0])
        if practice and shut and rng.random() < 0.15:
            return f"open {rng.choice(shut)}"
        template = "drop I" if practice and template == "put down I" else template  # as experts say it
        action = re.sub(r"\bI\b", lambda _: rng.choice(held or names), template)
        return re.sub(r"\bA\b", lambda _: rng.choice(names), action)

    return play(pool, panel, env, source, choose)
