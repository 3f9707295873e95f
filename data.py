"""What travels: Turn, Segment, Episode (a JSON line) and Transition, one decision of one of the three levels.

GLIDER (arXiv:2505.19761) eqs. 1-2 and STEP-HRL (arXiv:2604.05808): D^h holds one transition per subtask, D^l
one per action, D^p one per update of the local progress. What this file does not do: play, annotate or batch.
"""

import dataclasses
import json
import math
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import prompts
from progress import executor_prompt, planner_prompt, progress_prompt

SCHEMA = 1  # raised when a field changes its meaning
LEVELS = ("planner", "executor", "progress")


# --- episodes -------------------------------------------------------------------------------------------
@dataclass
class Turn:
    """One environment step: obs was seen BEFORE acting; reward and the flags are what the action brought."""

    obs: str
    action: str
    raw_text: str  # the executor's answer as it was sampled, before parsing ("" for an expert)
    reward: float  # score difference / 100
    terminated: bool
    truncated: bool
    subtask: str = ""
    progress: str = ""  # p_t: the local progress the executor saw before acting
    claimed_done: bool = False  # the executor's own flag
    verified_done: bool = False  # the judge's verdict on the resulting observation


@dataclass
class Segment:
    """A subtask as a k-step option: turns[start:end], and the final progress p-hat handed to the planner."""

    subtask: str
    start: int
    end: int
    final_progress: str


@dataclass
class Decision:
    """The tokens a policy sampled for one decision, kept so that nothing sampled is ever encoded again."""

    level: str
    turn: int  # planner: first turn of the segment; executor: its turn; progress: the turn that it folds in
    ids: list[int]
    logprobs: list[float]  # log pi of each token at temperature 1
    value: float | None = None  # Q(s,a) by the policy's critics, where eval.py noted it


@dataclass
class Episode:
    """N turns and N + 1 observations (the last is final_obs). score: the raw score at the end, in points."""

    env: str
    task: str
    variation: int | str  # a number in ScienceWorld, a game's id in ALFWorld
    description: str
    turns: list[Turn] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    final_obs: str = ""
    score: float = 0.0
    success: bool = False
    source: str = "expert"  # who played: "expert", or the policy's name and seed
    decisions: list[Decision] = field(default_factory=list)  # empty for an expert

    @property
    def id(self) -> str:
        return f"{self.source}/{self.task}/{self.variation}"

    def obs_after(self, turn: int) -> str:
        """The observation that turn `turn` led to."""
        return self.turns[turn + 1].obs if turn + 1 < len(self.turns) else self.final_obs


def _parse(cls, record: dict, where: str):
    """A dataclass from a JSON object, where what is None by default may be missing; ValueError else."""
    names = {f.name: f for f in dataclasses.fields(cls)}
    needed = {name for name, f in names.items() if f.default is not None}
    if not isinstance(record, dict) or not needed <= set(record) <= set(names):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: fields {found} are not those of {cls.__name__} {sorted(names)}; collect the file again"
        )
    return cls(**record)


def write_episodes(path: str | Path, episodes: Iterable[Episode], append: bool = False) -> None:
    """One JSON line an episode, flushed to disk whole, so that an interrupted run keeps what it had."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w") as file:
        for episode in episodes:
            file.write(json.dumps({"schema": SCHEMA} | dataclasses.asdict(episode)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_episodes(path: str | Path) -> list[Episode]:
    """Reads a JSONL file; ValueError with line number and remedy when it is damaged or of another schema."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no trajectories at {path}: make them with `python collect.py --out {path}`")
    episodes = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                remedy = "delete this line and run collect.py again; it resumes"
                raise ValueError(
                    f"{where}: damaged JSON ({error.msg} at column {error.colno}); {remedy}"
                ) from None
            if not isinstance(record, dict) or record.pop("schema", None) != SCHEMA:
                raise ValueError(
                    f"{where}: not an episode of schema {SCHEMA}; collect the file again with this version"
                )
            episode = _parse(Episode, record, where)
            episode.turns = [_parse(Turn, t, f"{where} turns") for t in episode.turns]
            episode.segments = [_parse(Segment, s, f"{where} segments") for s in episode.segments]
            episode.decisions = [_parse(Decision, d, f"{where} decisions") for d in episode.decisions]
            starts, ends = [s.start for s in episode.segments], [s.end for s in episode.segments]
            if ends and (
                [0, *ends] != [*starts, len(episode.turns)] or any(s.start >= s.end for s in episode.segments)
            ):
                raise ValueError(
                    f"{where}: segments do not cover the {len(episode.turns)} turns; annotate the file again"
                )
            episodes.append(episode)
    return episodes


# --- transitions ----------------------------------------------------------------------------------------
# The stored verdict of the judge; the executor's own flag (GLIDER's code); or the end of its segment, even
# where it was cut off, with a claim written into the answer (STEP-HRL's code).
Completion = Literal["judge", "claim", "segment"]
# What the action before it earned (STEP-HRL's code); or, for the text that is handed over, the planner's
# value of the state it leads to, and nothing on the way there.
ProgressReward = Literal["action", "planner"]
Limit = Literal["bootstrap", "end"]


@dataclass(frozen=True)
class Credit:
    """How executor and progress policy are rewarded, and what a step limit is; the papers leave it open."""

    completion: Completion = "judge"  # by the judge's verdict, the executor's claim, or its segment's end
    noise: float = 0.0  # probability with which that word is turned round; the draw depends on the turn alone
    invalid_penalty: float = 1.0  # cost of an action the world does not understand (STEP-HRL; GLIDER 0)
    progress: ProgressReward = "action"  # pay of progress: as the action before, or the planner's value
    limit: Limit = "bootstrap"  # what a step limit is; end: a failure, as if the world had ended
    clip_failure: bool = False  # a fatal mistake costs the points so far, as the metric counts, not 100

    def __post_init__(self):
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}, expected a probability, e.g. 0.1")


@dataclass
class Transition:
    """One decision of one level. next_prompt is "" only when terminated."""

    level: str
    prompt: str
    completion: str
    completion_ids: list[int]  # as sampled (EOS included unless cut); empty for an expert
    behavior_logprobs: list[float]  # log pi of those tokens when they were sampled; empty for an expert
    reward: float
    steps: int  # environment steps it spans
    terminated: bool
    truncated: bool
    next_prompt: str
    next_level: str  # whose value follows: its own level, or the planner (Credit.progress)
    source: str
    episode_id: str
    turn: int
    follows: "Transition | None" = field(default=None, repr=False, compare=False)  # the decision made there
    mc_return: float = math.nan  # discounted return to the end (set_returns); nan where that was cut off


def completed(episode: Episode, turn: int, final: bool, credit: Credit) -> bool:
    """Whether the subtask of `turn` counts as complete after it. final: the last turn of its segment."""
    t = episode.turns[turn]
    word = {"judge": t.verified_done, "claim": t.claimed_done, "segment": final}[credit.completion]
    return bool(word) ^ (random.Random(f"{episode.id}/{turn}").random() < credit.noise)


def transitions(
    episode: Episode, history: str = "progress", credit: Credit = Credit(), flat: bool = False
) -> list[Transition]:
    """An annotated episode -> its decisions at the three levels (the tables of 'What travels' in the README).

    planner    one per segment: reward = sum of environment rewards in it; terminated when the world ended
    executor   one per action: reward 1 when the subtask is completed, -invalid_penalty when the world did not
               understand; terminated when completed, when the world ended, or when it wrongly claimed to be
               done (the option is over); else, where its segment ends, truncated: the same subtask goes on
    progress   one per update, credited like the action it follows (STEP-HRL); none after the world ended
    flat       no planner (annotate.flat): the executor earns the environment's reward and ends with the world
    """
    if episode.turns and not episode.segments:
        raise ValueError(
            f"{episode.id} has no subtasks: annotate it first (`python collect.py --source gold` does)"
        )
    if credit.limit == "end":  # a truncated turn bootstraps, which never punishes a loop: V lives on itself
        over = [replace(t, terminated=t.terminated or t.truncated, truncated=False) for t in episode.turns]
        episode = replace(episode, turns=over)
    if credit.clip_failure:
        turns = zip(episode.turns, clipped_rewards(episode), strict=True)
        episode = replace(episode, turns=[replace(turn, reward=reward) for turn, reward in turns])
    sampled = {(d.level, d.turn): d for d in episode.decisions}
    result = []

    def add(level, turn, prompt, completion, next_level=None, relabelled=False, **fields):
        decision = None if relabelled else sampled.get((level, turn))
        ids, logprobs = (decision.ids, decision.logprobs) if decision else ([], [])
        result.append(
            Transition(
                level, prompt, completion, ids, logprobs, next_level=next_level or level,
                source=episode.source, episode_id=episode.id, turn=turn, **fields,
            )
        )  # fmt: skip

    for segment in episode.segments:
        turns, last = episode.turns[segment.start : segment.end], episode.turns[segment.end - 1]
        end_obs = episode.obs_after(segment.end - 1)
        next_plan = "" if last.terminated else planner_prompt(episode, segment.end, end_obs, history)
        if not flat:
            add(
                "planner", segment.start, planner_prompt(episode, segment.start, turns[0].obs, history),
                " " + segment.subtask, reward=sum(turn.reward for turn in turns), steps=len(turns),
                terminated=last.terminated, truncated=last.truncated, next_prompt=next_plan,
            )  # fmt: skip
        for t, turn in enumerate(turns, start=segment.start):
            final = t == segment.end - 1
            next_obs, next_progress = (
                episode.obs_after(t),
                segment.final_progress if final else episode.turns[t + 1].progress,
            )
            success = not flat and completed(episode, t, final, credit)
            ended = turn.terminated or success or (final and turn.claimed_done and not flat)
            paid = turn.reward if flat else float(success)
            outcome = {
                "reward": paid - credit.invalid_penalty * next_obs.startswith(prompts.NOT_UNDERSTOOD),
                "steps": 1, "terminated": ended, "truncated": final and not ended,
            }  # fmt: skip
            prompt = executor_prompt(
                episode, segment.start, t, segment.subtask, turn.progress, turn.obs, history
            )
            next_prompt = "" if ended else executor_prompt(
                episode, segment.start, t + 1, segment.subtask, next_progress, next_obs, history
            )  # fmt: skip
            relabel = not flat and credit.completion == "segment" and turn.claimed_done != final
            answer = turn.raw_text
            if relabel or not answer:  # STEP-HRL's code makes every segment end with a claim
                answer = prompts.executor_answer(turn.action, final if relabel else turn.claimed_done)
            add("executor", t, prompt, answer, next_prompt=next_prompt, relabelled=relabel, **outcome)
            if history == "progress" and not turn.terminated:
                prompt = progress_prompt(segment.subtask, turn.progress, turn.action, next_obs)
                last_update = not final and episode.turns[t + 1].terminated  # the world ends before another
                following = "" if final or last_update else progress_prompt(
                    segment.subtask, next_progress, episode.turns[t + 1].action, episode.obs_after(t + 1)
                )  # fmt: skip
                if credit.progress == "action" or flat:
                    outcome |= {"terminated": ended or final or last_update}
                    outcome |= {"next_prompt": "" if ended else following}
                else:
                    outcome |= {"reward": 0.0, "terminated": last_update}
                    outcome |= {"next_prompt": next_plan, "next_level": "planner"} if final else {}
                    outcome |= {"next_prompt": following} if not final else {}
                outcome["truncated"] = False
                add("progress", t, prompt, " " + next_progress, **outcome)
    _link(result)
    return result


def clipped_rewards(episode: Episode) -> list[float]:
    """Differences of max(0, score) / 100, one a turn: what the metric counts; a start may have points."""
    score = episode.score / 100 - sum(turn.reward for turn in episode.turns)
    rewards = []
    for turn in episode.turns:
        before, score = score, score + turn.reward
        rewards.append(max(0.0, score) - max(0.0, before))
    return rewards


def _link(decisions: list[Transition]) -> None:
    """Sets `follows`: the decision that was made in the next state, where the data go on from there."""
    at = {(t.level, t.turn): t for t in decisions}
    for t in decisions:
        after = at.get((t.next_level, t.turn + t.steps))
        if after and not t.terminated and after.prompt == t.next_prompt:
            t.follows = after


def set_returns(decisions: list[Transition], gamma: float, discount: str) -> None:
    """Sets mc_return: G = reward + discount * G of the decision that follows  (Monte Carlo; nan if cut off).

    decisions: those of whole episodes, in order. discount: "subtask" (gamma) or "smdp" (gamma^steps).
    """
    for t in reversed(sorted(decisions, key=lambda t: t.turn + t.steps)):
        rate = gamma**t.steps if discount == "smdp" else gamma
        tail = 0.0 if t.terminated else rate * t.follows.mc_return if t.follows else math.nan
        t.mc_return = t.reward + tail


if __name__ == "__main__":
    import tyro

    import show

    show.main(tyro.cli(show.Config))
