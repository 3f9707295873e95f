"""HiPER's plan-execute agent: one policy that keeps or switches its subgoal, then acts (arXiv:2602.16165).

A turn is one context: [prompt] keep|switch [Goal:] subgoal [Action:] action, every generated part ended by
EOS. Text in brackets is inserted by the host. On keep the host also inserts the stored subgoal, so a kept
subgoal is the same by construction, and what was inserted carries no loss, entropy or KL.
What this file does not do: estimate advantages (critic.py), or train (train_hiper.py).
Shapes: B turns, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import batches
import prompts
from acting import Policy, Request
from data import Episode, Segment
from envs import StepResult
from hierarchy import Counts, Player, episode_seed
from model import SHARED, text_ids

INSERTED, SWITCH, GOAL, ACTION = range(4)  # what a token of a turn belongs to; the prompt is inserted, too
KEEP_WORD, SWITCH_WORD, GOAL_CUE, ACTION_CUE = " keep", " switch", "\nGoal:", "\nAction:"
CUES = {GOAL: GOAL_CUE, ACTION: ACTION_CUE}
LIMITS = {SWITCH: 4, GOAL: 24, ACTION: 24}  # tokens of each part, its EOS included
DONE = 20  # last actions under a subgoal that its prompt lists


@dataclass(frozen=True)
class TurnRequest(Request):
    """A prompt and the subgoal in force; "" before the first, which must be chosen."""

    goal: str = ""


@dataclass
class Decided:
    """What was decided in one turn. ids: all tokens after the prompt; part and logprobs: of each of them."""

    prompt: str
    ids: list[int]
    part: list[int]  # INSERTED, SWITCH, GOAL or ACTION
    logprobs: list[float]  # log pi when sampled, at the temperature of play; 0 where inserted
    switched: bool
    goal: str
    action: str
    valid: bool  # the switch word was one of the two, and the parts that were sampled ended by themselves
    hidden: Tensor | None = None  # (2, D): after the prompt, and before the action
    prompt_tokens: int = 0

    def logp_of(self, part: int) -> float:
        """log pi of the tokens of one part, 0 without any."""
        return sum(x for x, k in zip(self.logprobs, self.part, strict=True) if k == part)


# --- texts --------------------------------------------------------------------------------------------------
def prompt_of(episode: Episode, closed: list[str], goal: str, start: int, t: int, obs: str) -> str:
    """The state at turn t: subgoals closed before, the one in force since turn `start`, its actions."""
    done = "; ".join(turn.action for turn in episode.turns[max(start, t - DONE) : t])
    return prompts.plan_execute(
        episode.description, "; ".join(closed) or "none", goal or "none", done or "none", obs
    )


def expert_turns(episode: Episode, tokenizer) -> Iterator[Decided]:
    """The turns of an annotated episode as this policy would have decided them: what SFT imitates."""
    eos, goal, start, closed = tokenizer.eos_token_id, "", 0, []
    for segment in episode.segments:
        for t in range(segment.start, segment.end):
            turn, switched = episode.turns[t], t == segment.start and segment.subtask != goal
            prompt = prompt_of(episode, closed, goal, start, t, turn.obs)
            if switched:
                closed, start = [*closed, goal] if goal else [], t
            words = {SWITCH: SWITCH_WORD if switched else KEEP_WORD, GOAL: f" {segment.subtask}"}
            words[ACTION] = f" {turn.action}"
            decided = Decided(prompt, [], [], [], switched, segment.subtask, turn.action, True)
            for part, cue in ((SWITCH, ""), (GOAL, GOAL_CUE), (ACTION, ACTION_CUE)):
                inserted = part == GOAL and not switched or part == SWITCH and not goal
                _append(decided, INSERTED, [(token, 0.0) for token in text_ids(tokenizer, cue)])
                ids = [*text_ids(tokenizer, words[part]), eos]
                _append(decided, INSERTED if inserted else part, [(token, 0.0) for token in ids])
            goal = segment.subtask
            yield decided


def _append(turn: Decided, part: int, tokens: list[tuple[int, float]]) -> None:
    turn.ids += [token for token, _ in tokens]
    turn.logprobs += [score for _, score in tokens]
    turn.part += [part] * len(tokens)


# --- acting -------------------------------------------------------------------------------------------------
class PlanExecute(Policy):
    """acting.Policy for turns: answer(requests) -> Decided, one each, with what the values read.

    Its policy is the softmax at `temperature`, in play and in training (hiper.improve).
    """

    def _answer(self, adapter: str, requests: list[TurnRequest], token_ids: list[list[int]]) -> list[Decided]:
        heat = [self.temperature["executor"]] * len(requests)
        noise = [torch.Generator().manual_seed(r.seed) if heat[0] > 0 else None for r in requests]
        tokenizer, eos, rows = self.tokenizer, self.tokenizer.eos_token_id, range(len(requests))
        cues = {part: list(text_ids(tokenizer, cue)) for part, cue in CUES.items()}
        context = self.context(adapter, requests, token_ids)
        turns = [Decided(r.prompt, [], [], [], not r.goal, r.goal, "", True) for r in requests]
        for turn, ids in zip(turns, token_ids, strict=True):
            turn.prompt_tokens = len(ids)
        after_prompt = context.hidden

        def write(part: int, active: list[bool]) -> list[str]:
            written = context.write([LIMITS[part] if on else 0 for on in active], heat, noise, True)
            for turn, tokens in zip(turns, written, strict=True):
                _append(turn, part, tokens)
                turn.valid &= not tokens or tokens[-1][0] == eos
            return [tokenizer.decode([x for x, _ in w], skip_special_tokens=True).strip() for w in written]

        def insert(texts: list[list[int]]) -> None:
            for turn, ids in zip(turns, texts, strict=True):
                _append(turn, INSERTED, [(token, 0.0) for token in ids])
            context.read(texts)

        words = write(SWITCH, [bool(r.goal) for r in requests])
        for turn, request, word in zip(turns, requests, words, strict=True):
            if request.goal:
                turn.switched = word != KEEP_WORD.strip()  # as released, whatever is not KEEP switches
                turn.valid &= word in (KEEP_WORD.strip(), SWITCH_WORD.strip())
        keep = [not turn.switched for turn in turns]
        first = [*text_ids(tokenizer, SWITCH_WORD), eos]  # the first subgoal is no choice
        kept = [[*text_ids(tokenizer, f" {r.goal}"), eos, *cues[ACTION]] for r in requests]
        begins = [([] if r.goal else first) + cues[GOAL] for r in requests]
        insert([begins[b] + (kept[b] if keep[b] else []) for b in rows])
        goals = write(GOAL, [not k for k in keep])
        insert([[] if k else cues[ACTION] for k in keep])
        before_action = context.hidden
        actions = write(ACTION, [True] * len(turns))
        for b, turn in enumerate(turns):
            turn.goal = requests[b].goal if keep[b] else goals[b] or "none"
            turn.action = actions[b] or "none"
            turn.hidden = torch.stack([after_prompt[b], before_action[b]]).float().cpu()
        return turns

    def look(self, requests: list[TurnRequest]) -> Tensor:
        """Hidden states (B, 2, D) as of `hidden`, had the subgoal been kept; nothing is sampled."""
        found, eos = [], self.tokenizer.eos_token_id
        for begin in range(0, len(requests), 64):
            part, kept = requests[begin : begin + 64], []
            for r in part:
                texts = (KEEP_WORD, eos, GOAL_CUE, f" {r.goal}", eos, ACTION_CUE)
                kept.append([i for x in texts for i in ([x] if x == eos else text_ids(self.tokenizer, x))])
            context = self.context(SHARED, part, [self.encode(r.prompt) for r in part])
            found.append(torch.stack([context.hidden, context.read(kept)], 1).float().cpu())
        return torch.cat(found)


class TurnPlayer(Player):
    """One running episode of a plan-execute agent, for hierarchy.rollout; keeps what was decided.

    max_misses: the episode is cut off after so many actions in a row that were not understood; 0: never.
    """

    def __init__(self, episode: Episode, first: StepResult, seed: int, judge: Callable, max_misses: int = 0):
        super().__init__(episode, first, "full", 0, seed, judge, "episode")  # ends with the world alone
        self.subtask, self.closed, self.turns, self.max_misses, self.misses = "", [], [], max_misses, 0

    def request(self) -> TurnRequest:
        t = len(self.episode.turns)
        prompt = prompt_of(self.episode, self.closed, self.subtask, self.start, t, self.now.obs)
        seed = episode_seed(self.seed, self.episode.task, self.episode.variation, t)
        return TurnRequest("executor", prompt, sum(LIMITS.values()), seed, self.subtask)

    def receive(self, answer: Decided, counts: Counts) -> str:
        """Closes the subgoal that was switched away from; returns the action."""
        t = len(self.episode.turns)
        if answer.switched:
            if self.subtask:
                self.closed.append(self.subtask)
                self.episode.segments.append(Segment(self.subtask, self.start, t, ""))
            self.subtask, self.start = answer.goal, t
        counts.prompt_tokens["executor"] += answer.prompt_tokens
        counts.completion_tokens["executor"] += len(answer.ids)
        counts.decisions["executor"] += 1
        counts.parse_failures += not answer.valid
        self.turns.append(answer)
        self.pending = ("", answer.action, False)
        return answer.action

    def stepped(self, result: StepResult, counts: Counts) -> None:
        """As Player; cut off where it gives up."""
        self.misses = self.misses + 1 if result.obs.startswith(prompts.NOT_UNDERSTOOD) else 0
        if 0 < self.max_misses <= self.misses and not result.terminated:
            result = replace(result, truncated=True)
        super().stepped(result, counts)

    def answers(self) -> list[str]:
        """What the world said after each turn."""
        return [turn.obs for turn in self.episode.turns[1:]] + [self.now.obs]


# --- batches ------------------------------------------------------------------------------------------------
class TurnBatch(NamedTuple):
    """B turns as right-padded tokens."""

    input_ids: Tensor  # (B, T)
    part: Tensor  # (B, T): SWITCH, GOAL or ACTION where a token was decided, INSERTED elsewhere
    logprobs: Tensor  # (B, T): log pi of the decided tokens when they were sampled
    advantage: Tensor  # (B, T): of the part that the token belongs to

    def to(self, device) -> "TurnBatch":
        return TurnBatch(*(column.to(device) for column in self))


def collate(turns: list[Decided], encode: Callable, advantage: Tensor | None = None) -> TurnBatch:
    """Turns -> TurnBatch. encode: acting.Policy.encode. advantage (B, 3): of switch, subgoal and action."""
    prompts_ = [encode(turn.prompt) for turn in turns]
    width = max(len(p) + len(turn.ids) for p, turn in zip(prompts_, turns, strict=True))

    def rows(before: list[list], field: str) -> Tensor:
        own = [p + list(getattr(turn, field)) for p, turn in zip(before, turns, strict=True)]
        return torch.tensor([row + [0] * (width - len(row)) for row in own])

    nothing = [[0] * len(p) for p in prompts_]
    part = rows(nothing, "part")
    by_part = torch.zeros(len(turns), 4)
    if advantage is not None:
        by_part[:, 1:] = advantage
    ids, logprobs = rows(prompts_, "ids"), rows(nothing, "logprobs").float()
    return TurnBatch(ids, part, logprobs, torch.where(part > 0, by_part.gather(1, part), 0.0))


def by_length(turns: list[Decided], encode: Callable, max_tokens: int) -> list[list[int]]:
    """Places of the turns in groups of like length, at most max_tokens padded tokens each."""
    lengths = [len(encode(turn.prompt)) + len(turn.ids) for turn in turns]
    return batches.by_length(range(len(turns)), lengths.__getitem__, max_tokens)
