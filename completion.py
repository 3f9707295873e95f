"""Is the subtask complete? Who says so, how far they agree, and what a wrong word does.

The papers leave it open: GLIDER (arXiv:2505.19761, footnote 2) reads it from the observation, its code and
that of STEP-HRL (arXiv:2604.05808) believe the executor. Here a judge(subtask, observation) -> bool is a rule
(annotate.judge), a chat model (teacher.ChatTeacher.judge), or either with noise. What this file does not do:
pay for it (data.Credit), or end a subtask (hierarchy.Ends).
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Callable

from data import Episode, Segment
from hierarchy import Ends

Judge = Callable[[str, str], bool]  # (subtask, resulting observation) -> complete?


def noisy(judge: Judge, probability: float, seed: int = 0) -> Judge:
    """The judge with its verdict turned round with this probability; the same question, the same answer."""
    if not 0 <= probability <= 1:
        raise ValueError(f"the noise of the judge is {probability}, expected a probability, e.g. 0.1")

    def verdict(subtask: str, obs: str) -> bool:
        return judge(subtask, obs) ^ (random.Random(f"{seed}/{subtask}/{obs}").random() < probability)

    return verdict if probability > 0 else judge


def rejudge(episode: Episode, judge: Judge) -> Episode:
    """A new episode with this judge's verdict after every action."""
    new = copy.deepcopy(episode)
    for i, turn in enumerate(new.turns):
        turn.verified_done = bool(judge(turn.subtask, new.obs_after(i)))
    return new


def agreement(episodes: list[Episode], judge: Judge) -> float:
    """Share of actions after which the stored verdict is also this judge's; nan without actions."""
    same = [
        turn.verified_done == bool(judge(turn.subtask, episode.obs_after(i)))
        for episode in episodes
        for i, turn in enumerate(episode.turns)
    ]
    return sum(same) / len(same) if same else math.nan


def ended_by(episode: Episode, segment: Segment, ends: Ends) -> str:
    """What ended a subtask: world (solved or lost), limit (of steps), claim, judge or cap (on actions)."""
    last = episode.turns[segment.end - 1]
    if last.terminated or last.truncated:
        return "world" if last.terminated else "limit"
    if ends == "claim" and last.claimed_done or ends == "judge" and last.verified_done:
        return ends
    return "cap"


def summary(episodes: list[Episode], ends: Ends = "claim") -> dict:
    """How subtasks end, and how the executor's claims agree with the judge's verdicts, action by action.

    agreement   share of actions after which claim = verdict
    precision   of the claims, the share that the judge confirms; None without a claim
    recall      of the completions by the judge, the share that the executor claims; None without one
    """
    segments = [(episode, segment) for episode in episodes for segment in episode.segments]
    words = Counter((t.claimed_done, t.verified_done) for e, s in segments for t in e.turns[s.start : s.end])
    actions, both = words.total(), words[True, True]
    claims, verdicts = both + words[True, False], both + words[False, True]
    ended = Counter(ended_by(episode, segment, ends) for episode, segment in segments)
    return {
        "ends": ends,
        "count": len(segments),
        "mean_length": round(actions / max(1, len(segments)), 2),
        "ended_by": {how: ended[how] for how in ("claim", "judge", "cap", "limit", "world")},
        "agreement": round((both + words[False, False]) / actions, 4) if actions else None,
        "precision": round(both / claims, 4) if claims else None,
        "recall": round(both / verdicts, 4) if verdicts else None,
    }
