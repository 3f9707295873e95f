"""Annotation: splits flat actions into subtasks, writes progress and judges completion.

GLIDER (arXiv:2505.19761) and STEP-HRL (arXiv:2604.05808, sec. 4) ask a large model (teacher.py). Here rules
do it, one file a world: split, progress_text and judge. What this file does not do: know a world, or tell
how good the labels are (labels.py).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import alfworld_rules
import scienceworld_rules
from data import Credit, Episode, Segment, Transition, set_returns, transitions
from prompts import NO_PROGRESS, compact, split_obs
from readings import RLConfig

Group = tuple[str, int, int]  # subtask, start, end: actions[start:end]


class Rules(Protocol):
    """What alfworld_rules.py and scienceworld_rules.py have in common."""

    MAX_ACTIONS: int  # cap of one group; what takes longer goes on under the same name in the next group
    MAX_ACTIONS_IN_PLAY: int  # cap on the actions of one subtask of a policy
    COMMON_NAMES: str  # what a subtask may name unseen
    FORMS: str  # the names of subtasks, as a teacher is told them

    def split(self, description: str, actions: list[str], observations: list[str]) -> list[Group]: ...
    def progress_text(self, subtask: str, previous: str, action: str, feedback: str) -> str: ...
    def judge(self, subtask: str, obs: str) -> bool: ...
    def unknown_names(self, text: str, *sources: str) -> list[str]: ...


def rules(env: str) -> Rules:
    """The rules of a world, whichever engine plays it."""
    known = {"alfworld": alfworld_rules, "scienceworld": scienceworld_rules}
    if (world := env.split("-")[0]) not in known:
        raise ValueError(f"no rules for env {env!r}: expected one of {list(known)}; use episodes of these")
    return known[world]


def max_actions(env: str, chosen: int) -> int:
    """The cap on the actions of one subtask in play: the chosen one, or where it is 0 the world's own."""
    return chosen or rules(env).MAX_ACTIONS_IN_PLAY


class Teacher(Protocol):
    """Whoever annotates instead of the rules: teacher.ChatTeacher."""

    def annotate(self, episode: Episode) -> Episode: ...


def fill_in(episode: Episode, groups: list[Group], write: Callable[..., str] | None = None) -> Episode:
    """A new episode with these subtasks, and progress by write(subtask, previous, action, feedback)."""
    new, world = copy.deepcopy(episode), rules(episode.env)
    write = write or world.progress_text
    new.segments = []
    for subtask, start, end in groups:
        progress = NO_PROGRESS
        for i, turn in enumerate(new.turns[start:end], start):
            turn.subtask, turn.progress, turn.claimed_done = subtask, progress, i == end - 1
            turn.verified_done = world.judge(subtask, new.obs_after(i))
            progress = write(subtask, progress, turn.action, split_obs(new.obs_after(i))[0])
        new.segments.append(Segment(subtask, start, end, progress))
    return new


def flat(episode: Episode) -> Episode:
    """A new episode with one subtask, the task itself, progress by rules: what a flat agent learns from."""
    task, subtasks = compact(episode.description), [s.subtask for s in episode.segments]
    whole = [(task, 0, len(episode.turns))]  # and no decisions: they were sampled for other prompts
    return episode if subtasks == [task] else fill_in(replace(episode, decisions=[]), whole)


def decisions_of(episodes: list[Episode], meta: dict, credit: Credit, rl: RLConfig) -> list[Transition]:
    """All decisions for the policy that `meta` (its policy.json) describes, with Monte-Carlo returns."""
    is_flat, decisions = meta.get("flat", False), []
    for episode in episodes:
        decisions += transitions(flat(episode) if is_flat else episode, meta["history"], credit, is_flat)
    set_returns(decisions, rl.gamma, rl.discount)
    return decisions


def annotate(episode: Episode, teacher: Teacher | None = None) -> Episode:
    """A new episode with subtasks, progress, segments and verdicts, by these rules or by `teacher`."""
    ended = [i for i, turn in enumerate(episode.turns) if turn.terminated]
    if ended:  # what follows completion is dropped
        turns, final_obs = episode.turns[: ended[0] + 1], episode.obs_after(ended[0])
        episode = replace(episode, turns=turns, final_obs=final_obs, segments=[])
    if teacher:
        return teacher.annotate(episode)
    return fill_in(episode, groups_of(episode, episode.description))


def practised(episode: Episode) -> Episode:
    """Exploration, annotated in hindsight: a subtask may name what was found by doing it.

    What the world asks back ends a subtask, which is then given again: who claims to be done with an action
    does not know yet that it will be asked.
    """
    found, groups = " ".join(turn.obs for turn in episode.turns), []
    for subtask, start, end in groups_of(episode, f"{episode.description} {found}"):
        answers = [i for i in range(start + 1, end) if episode.turns[i].obs.startswith("Ambiguous")]
        groups += [(subtask, *turns) for turns in pairwise([start, *answers, end])]
    return fill_in(episode, groups)


def groups_of(episode: Episode, known: str) -> list[Group]:
    """The subtasks by rules. known: text whose names may be used before they are seen."""
    observations = [turn.obs for turn in episode.turns] + [episode.final_obs]
    return rules(episode.env).split(known, [turn.action for turn in episode.turns], observations)
