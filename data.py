"""What travels: Turn, Segment, Episode (one JSON line each), Transition, Batch; episodes -> the training sets of the three levels.

GLIDER (arXiv:2505.19761) eqs. 1-2 and STEP-HRL (arXiv:2604.05808): D^h holds one transition per subtask, D^l one per action, D^p one
per local-progress update. What this file does not do: play, annotate or train.
"""

import dataclasses
import functools
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import prompts
from progress import executor_prompt, planner_prompt, progress_prompt

SCHEMA = 1  # raised when a field changes its meaning
LEVELS = ("planner", "executor", "progress")


# --- episodes -----------------------------------------------------------------------------------------------------
@dataclass
class Turn:
    """One environment step: obs is what the agent saw BEFORE acting; reward and the flags are what the action brought."""

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
    turn: int  # planner: first turn of the segment; executor: its turn; progress: the turn whose outcome it folds in
    ids: list[int]
    logprobs: list[float]  # log pi of each token at temperature 1


@dataclass
class Episode:
    """N turns and N + 1 observations (the last one is final_obs). score is the raw score at the end, in points."""

    env: str
    task: str
    variation: int
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
    """A dataclass from a JSON object; ValueError names what is missing or unknown."""
    names = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(record, dict) or set(record) != set(names):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: fields {found} are not those of {cls.__name__} {sorted(names)}; collect the file again")
    return cls(**record)


def write_episodes(path: str | Path, episodes: Iterable[Episode], append: bool = False) -> None:
    """One JSON line an episode. Each line is flushed to disk whole, so an interrupted run keeps what it had."""
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
                raise ValueError(f"{where}: damaged JSON ({error.msg} at column {error.colno}); {remedy}") from None
            if not isinstance(record, dict) or record.pop("schema", None) != SCHEMA:
                raise ValueError(f"{where}: not an episode of schema {SCHEMA}; collect the file again with this version")
            episode = _parse(Episode, record, where)
            episode.turns = [_parse(Turn, t, f"{where} turns") for t in episode.turns]
            episode.segments = [_parse(Segment, s, f"{where} segments") for s in episode.segments]
            episode.decisions = [_parse(Decision, d, f"{where} decisions") for d in episode.decisions]
            starts, ends = [s.start for s in episode.segments], [s.end for s in episode.segments]
            if ends and ([0, *ends] != [*starts, len(episode.turns)] or any(s.start >= s.end for s in episode.segments)):
                raise ValueError(f"{where}: segments do not cover the {len(episode.turns)} turns; annotate the file again")
            episodes.append(episode)
    return episodes


# --- transitions --------------------------------------------------------------------------------------------------
@dataclass
class Transition:
    """One decision of one level. steps: environment steps it spans. next_prompt is "" only when terminated."""

    level: str
    prompt: str
    completion: str
    completion_ids: list[int]  # what was sampled (EOS included unless cut); empty for an expert: encoded when batched
    behavior_logprobs: list[float]  # log pi of those tokens when they were sampled; empty for an expert
    reward: float
    steps: int
    terminated: bool
    truncated: bool
    next_prompt: str
    source: str
    episode_id: str
    turn: int


def transitions(episode: Episode, history: str = "progress", invalid_penalty: float = 0.0) -> list[Transition]:
    """An annotated episode -> its decisions at the three levels (the tables of 'What travels' in the README).

    planner    one per segment: reward = sum of environment rewards in it; terminated when the world ended
    executor   one per action: reward 1 when the judge verified completion, -invalid_penalty when the world did not
               understand; terminated when verified, when the world ended, or when it wrongly claimed to be done
               (the option is over); else, at the cap on actions or the step limit, truncated: the same subtask goes on
    progress   one per update, credited like the action it follows (STEP-HRL); none after the world ended
    """
    if episode.turns and not episode.segments:
        raise ValueError(f"{episode.id} has no subtasks: annotate it first (`python collect.py --source gold` does)")
    sampled = {(d.level, d.turn): d for d in episode.decisions}
    result = []

    def add(level, turn, prompt, completion, **fields):
        decision = sampled.get((level, turn))
        ids, logprobs = (decision.ids, decision.logprobs) if decision else ([], [])
        result.append(
            Transition(
                level, prompt, completion, ids, logprobs, source=episode.source, episode_id=episode.id, turn=turn, **fields
            )
        )

    for segment in episode.segments:
        turns, last = episode.turns[segment.start : segment.end], episode.turns[segment.end - 1]
        end_obs = episode.obs_after(segment.end - 1)
        add(
            "planner", segment.start, planner_prompt(episode, segment.start, turns[0].obs, history), " " + segment.subtask,
            reward=sum(turn.reward for turn in turns), steps=len(turns), terminated=last.terminated, truncated=last.truncated,
            next_prompt="" if last.terminated else planner_prompt(episode, segment.end, end_obs, history),
        )  # fmt: skip
        for t, turn in enumerate(turns, start=segment.start):
            final = t == segment.end - 1
            next_obs, next_progress = episode.obs_after(t), segment.final_progress if final else episode.turns[t + 1].progress
            invalid = next_obs.startswith(prompts.NOT_UNDERSTOOD)
            ended = turn.verified_done or turn.terminated or turn.claimed_done
            credit = {
                "reward": float(turn.verified_done) - invalid_penalty * invalid, "steps": 1,
                "terminated": ended, "truncated": final and not ended,
            }  # fmt: skip
            prompt = executor_prompt(episode, segment.start, t, segment.subtask, turn.progress, turn.obs, history)
            next_prompt = (
                "" if ended
                else executor_prompt(episode, segment.start, t + 1, segment.subtask, next_progress, next_obs, history)
            )  # fmt: skip
            answer = turn.raw_text or prompts.executor_answer(turn.action, turn.claimed_done)
            add("executor", t, prompt, answer, next_prompt=next_prompt, **credit)
            if history == "progress" and not turn.terminated:
                prompt = progress_prompt(segment.subtask, turn.progress, turn.action, next_obs)
                following = "" if ended or final else progress_prompt(
                    segment.subtask, next_progress, episode.turns[t + 1].action, episode.obs_after(t + 1)
                )  # fmt: skip
                credit_p = credit | {"terminated": ended or final, "truncated": False}
                add("progress", t, prompt, " " + next_progress, next_prompt=following, **credit_p)
    return result


# --- tokens and batches -------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """B decisions as right-padded tokens; T is their longest prompt + completion, T2 the longest next prompt."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) bool
    action_mask: Tensor  # (B, T) bool: the completion, its EOS included
    state_index: Tensor  # (B,) last token of the prompt: V reads here
    action_index: Tensor  # (B,) last token of the completion: Q reads here
    next_ids: Tensor  # (B, T2)
    next_mask: Tensor  # (B, T2) bool
    next_index: Tensor  # (B,) last token of the next prompt
    level: Tensor  # (B,) index into LEVELS
    reward: Tensor  # (B,)
    steps: Tensor  # (B,) environment steps spanned
    terminated: Tensor  # (B,) bool: no bootstrap

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` decisions, in order."""
        columns = [getattr(self, f.name).split(size) for f in dataclasses.fields(self)]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]


@functools.lru_cache(maxsize=200_000)
def _ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def encode(tokenizer, prompt: str, completion: str, completion_ids: list[int] = ()) -> tuple[list[int], list[int]]:
    """Prompt ids (with BOS, once) and completion ids (apart, EOS appended); sampled ids are never encoded again."""
    prompt_ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    prompt_ids += _ids(tokenizer, prompt)
    if not completion_ids:
        completion_ids = [*_ids(tokenizer, completion), tokenizer.eos_token_id]
    return prompt_ids, list(completion_ids)


def _pad(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Right-padded (B, T) ids and their mask; the mask comes from lengths, never from `ids == fill`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


def collate(items: list[Transition], tokenizer) -> Batch:
    """Decisions -> Batch. A terminated decision has no next prompt; one token stands in, and `terminated` masks it."""
    pairs = [encode(tokenizer, t.prompt, t.completion, t.completion_ids) for t in items]
    nexts = [encode(tokenizer, t.next_prompt, "")[0] or [tokenizer.eos_token_id] for t in items]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids, attention_mask = _pad([p + c for p, c in pairs], pad)
    next_ids, next_mask = _pad(nexts, pad)
    state_index = torch.tensor([len(p) - 1 for p, _ in pairs])
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        action_mask=attention_mask & (torch.arange(input_ids.shape[1]) > state_index[:, None]),
        state_index=state_index,
        action_index=torch.tensor([len(p) + len(c) - 1 for p, c in pairs]),
        next_ids=next_ids,
        next_mask=next_mask,
        next_index=next_mask.sum(1) - 1,
        level=torch.tensor([LEVELS.index(t.level) for t in items]),
        reward=torch.tensor([t.reward for t in items], dtype=torch.float32),
        steps=torch.tensor([t.steps for t in items]),
        terminated=torch.tensor([t.terminated for t in items]),
    )


def micro_batches(items: list[Transition], tokenizer, max_tokens: int) -> list[list[Transition]]:
    """Splits decisions into groups of like length whose padded size stays below max_tokens: little padding, bounded memory."""
    lengths = {id(t): sum(map(len, encode(tokenizer, t.prompt, t.completion, t.completion_ids))) for t in items}
    groups, width = [[]], 0
    for item in sorted(items, key=lambda t: lengths[id(t)]):
        width = lengths[id(item)]
        if groups[-1] and width * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


# --- sampling -----------------------------------------------------------------------------------------------------
class Mixture:
    """Endless batches drawn from named pools at fixed ratios, e.g. {"expert": 1, "rollout": 2} (GLIDER's 1:2).

    Every pool is walked in its own seeded order, reshuffled each time it is used up. state_dict() makes it resumable.
    """

    def __init__(self, pools: dict[str, list[Transition]], ratio: dict[str, float], seed: int):
        ratio = {name: share for name, share in ratio.items() if share > 0}
        if empty := [name for name in ratio if not pools.get(name)]:
            raise ValueError(f"no transitions in {empty}: collect them first or set their ratio to 0")
        self.pools, self.ratio, self.seed = pools, ratio, seed
        self.used = dict.fromkeys(ratio, 0)  # decisions drawn so far, per pool
        self._orders = {}

    def _item(self, name: str) -> Transition:
        pool = self.pools[name]
        epoch, position = divmod(self.used[name], len(pool))
        if self._orders.get(name, (None,))[0] != epoch:
            order = list(range(len(pool)))
            random.Random(f"{self.seed}/{name}/{epoch}").shuffle(order)
            self._orders[name] = (epoch, order)
        self.used[name] += 1
        return pool[self._orders[name][1][position]]

    def batch(self, size: int) -> list[Transition]:
        """`size` decisions; each comes from the pool that is furthest behind its ratio."""
        names = list(self.ratio)
        return [self._item(min(names, key=lambda n: self.used[n] / self.ratio[n])) for _ in range(size)]

    def state_dict(self) -> dict:
        return {"used": dict(self.used)}

    def load_state_dict(self, state: dict) -> None:
        self.used = dict(state["used"])
