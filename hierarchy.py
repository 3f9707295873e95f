"""Planner over executor in lockstep: many episodes at once, three roles served in shared batches.

Every running episode waits for exactly one thing: an answer of one of its three roles, or its world. A round
asks the policy for all waiting answers in one batch, whatever their roles, then steps all worlds whose action
is known. A subtask is an option (Sutton, Precup & Singh 1999): Ends says what terminates it. GLIDER
(arXiv:2505.19761, sec. 3.2) and STEP-HRL (arXiv:2604.05808, sec. 3) let the executor's own flag do so.
What this file does not do: train, or judge completion (completion.py).
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import prompts
from acting import Answer, Request
from data import Decision, Episode, Segment, Turn
from envs import EnvPool, StepResult
from progress import History, executor_prompt, planner_prompt, progress_prompt

# What ends a subtask, beside the cap on its actions and the episode: the executor's claim; the judge's
# verdict; nothing else (a fixed-length planner); not even the cap: one subtask, the task itself (flat agent).
Ends = Literal["claim", "judge", "cap", "episode"]
MAX_NEW_TOKENS = {"planner": 32, "executor": 32, "progress": 64}


class Acts(Protocol):
    """Answers requests in one batch: acting.Policy, or a scripted stand-in in tests."""

    def answer(self, requests: list[Request]) -> list[Answer]:
        """One Answer per Request, in order."""


@dataclass
class Counts:
    """Totals over a rollout; the rates of an evaluation are made of these."""

    steps: int = 0  # environment steps
    parse_failures: int = 0  # executor answers that were not '<action>; True|False'
    prompt_tokens: dict = None  # per role
    completion_tokens: dict = None
    decisions: dict = None

    def __post_init__(self):
        for name in ("prompt_tokens", "completion_tokens", "decisions"):
            setattr(self, name, dict.fromkeys(MAX_NEW_TOKENS, 0))


def episode_seed(seed: int, *parts) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest(), "big") >> 1


class Player:
    """One running episode, and which of pi^h, pi^l, pi^p (STEP-HRL sec. 3) or the world it waits for.

    give_up: the episode is cut off, as at the step limit, once a subtask was given so many times; 0: never.
    """

    def __init__(
        self,
        episode: Episode,
        first: StepResult,
        history: History,
        max_actions: int,
        seed: int,
        judge: Callable,
        ends: Ends,
        give_up: int = 0,
    ):
        self.episode, self.history, self.max_actions, self.seed = episode, history, max_actions, seed
        self.judge, self.ends, self.give_up = judge, ends, give_up
        self.now, self.waits_for = first, "executor" if ends == "episode" else "planner"
        self.subtask = prompts.compact(episode.description) if ends == "episode" else ""
        self.progress, self.start = prompts.NO_PROGRESS, 0
        self.pending: tuple[str, str, bool] | None = None  # raw_text, action, claimed_done

    def request(self) -> Request:
        """The state of pi^h, pi^l or pi^p, whichever it waits for, as a prompt  (progress.py)."""
        episode, t = self.episode, len(self.episode.turns)
        if self.waits_for == "planner":
            prompt = planner_prompt(episode, t, self.now.obs, self.history)
        elif self.waits_for == "executor":
            prompt = executor_prompt(
                episode, self.start, t, self.subtask, self.progress, self.now.obs, self.history
            )
        else:
            prompt = progress_prompt(self.subtask, self.progress, episode.turns[-1].action, self.now.obs)
        role = self.waits_for
        seed = episode_seed(self.seed, episode.task, episode.variation, t, role)
        return Request(role, prompt, MAX_NEW_TOKENS[role], seed)

    def receive(self, answer: Answer, counts: Counts) -> str | None:
        """Takes the answer it waited for; returns an action when the world is next."""
        role, t = self.waits_for, len(self.episode.turns)
        turn = t - 1 if role == "progress" else t
        self.episode.decisions.append(
            Decision(role, turn, answer.ids, [round(x, 4) for x in answer.logprobs])
        )
        counts.prompt_tokens[role] += answer.prompt_tokens
        counts.completion_tokens[role] += len(answer.ids)
        counts.decisions[role] += 1
        if role == "planner":
            self.subtask, self.progress, self.start = answer.text.strip() or "none", prompts.NO_PROGRESS, t
            self.waits_for = "executor"
        elif role == "executor":
            action, claimed, parsed = prompts.parse_executor(answer.text)
            counts.parse_failures += not parsed
            self.pending = (answer.text, action, claimed)
            return action
        else:
            self.progress = answer.text.strip() or prompts.NO_PROGRESS
            self._after_progress()
        return None

    def stepped(self, result: StepResult, counts: Counts) -> None:
        """The world answered a_t with o_{t+1} and r_t: kept as a turn, with the verdict on o_{t+1}."""
        raw_text, action, claimed = self.pending
        verified = bool(self.judge(self.subtask, result.obs))
        turn = Turn(
            self.now.obs, action, raw_text, result.reward, result.terminated, result.truncated,
            self.subtask, self.progress, claimed, verified,
        )  # fmt: skip
        self.episode.turns.append(turn)
        self.now = result
        counts.steps += 1
        if self.history == "progress" and not result.terminated:
            self.waits_for = "progress"
        else:
            self._after_progress()

    def _after_progress(self) -> None:
        """Ends the subtask or goes on with it."""
        last, length = self.episode.turns[-1], len(self.episode.turns) - self.start
        over = self.now.terminated or self.now.truncated
        word = {"claim": last.claimed_done, "judge": last.verified_done}.get(self.ends, False)
        if over or word or (length >= self.max_actions and self.ends != "episode"):
            segments = self.episode.segments
            segments.append(Segment(self.subtask, self.start, len(self.episode.turns), self.progress))
            if not over and 0 < self.give_up <= sum(s.subtask == self.subtask for s in segments):
                over = last.truncated = True
            self.waits_for = "nothing" if over else "planner"
        else:
            self.waits_for = "executor"

    @property
    def over(self) -> bool:
        """Whether it waits for nothing: the episode ended."""
        return self.waits_for == "nothing"

    def finished(self) -> Episode:
        """The episode with its last observation, score and success."""
        return replace(self.episode, final_obs=self.now.obs, score=self.now.score, success=self.now.success)


class Guided(Player):
    """A player with an expert in place of one level, to find out which level is the bottleneck.

    guide="planner": its subtasks, each until the judge verifies it. guide="executor": its actions, wherever
    the planner names one of its subtasks. Beyond the expert's annotated episode the policy answers.
    """

    def __init__(self, *args, expert: Episode, guide: Literal["planner", "executor"]):
        super().__init__(*args)
        self.guide, self.actions = guide, []
        self.plan = [(s.subtask, [t.action for t in expert.turns[s.start : s.end]]) for s in expert.segments]

    def receive(self, answer: Answer, counts: Counts) -> str | None:
        """As Player, after the expert has had its say."""
        if self.waits_for == "executor" and self.actions:
            action = self.actions.pop(0)
            answer = _said(answer, prompts.executor_answer(action, not self.actions))
        elif self.waits_for == "planner" and self.guide == "planner":
            if self.plan and self.episode.turns and self.episode.turns[-1].verified_done:
                self.plan.pop(0)
            answer = _said(answer, self.plan[0][0]) if self.plan else answer
        elif self.waits_for == "planner":
            named = [i for i, (subtask, _) in enumerate(self.plan) if subtask == answer.text.strip()]
            self.actions = self.plan.pop(named[0])[1] if named else []
        return super().receive(answer, counts)


class Curious(Player):
    """A player whose planner, with probability epsilon, says something else than it would.

    Half of these times it begins with another word and the policy says the rest; half of them it says another
    of the `plans` that begin with its own word ("explore the outside" for "explore the kitchen"). Epsilon-
    greedy over kinds of subtasks, and over what they are about: a policy fresh from imitation gives most of
    them no probability, and what is never tried is never learned.

    plans: subtasks, e.g. an expert's; one that stands there twice is drawn twice as often.
    """

    def __init__(self, *args, epsilon: float, plans: list[str], **fields):
        super().__init__(*args, **fields)
        self.epsilon, self.word, self.other = epsilon, "", False
        self.plans = {}  # by first word
        for plan in plans:
            self.plans.setdefault(plan.split()[0], []).append(plan)

    def request(self) -> Request:
        """As Player; another first word may be given."""
        request, self.word, self.other = super().request(), "", False
        self.rng = random.Random(request.seed)
        if request.role == "planner" and self.rng.random() < self.epsilon:
            self.other = self.rng.random() < 0.5
            self.word = "" if self.other else " " + self.rng.choice(sorted(self.plans))
        return replace(request, begun=self.word)

    def receive(self, answer: Answer, counts: Counts) -> str | None:
        """As Player; the first word belongs to the answer, and another plan stands for it."""
        same = self.plans.get(answer.text.split()[0]) if self.other and answer.text.strip() else None
        if same:
            answer = _said(answer, " " + self.rng.choice(same))
        return super().receive(_said(answer, self.word + answer.text) if self.word else answer, counts)


def _said(answer: Answer, text: str) -> Answer:
    """Another text in place of the policy's, without the tokens that the policy sampled."""
    return replace(answer, text=text, ids=[], logprobs=[])


def rollout(
    pool: EnvPool,
    panel: list[tuple[str, int]],
    policy: Acts,
    judge: Callable[[str, str], bool],
    *,
    env: str = "scienceworld",
    history: History = "progress",
    ends: Ends = "claim",
    max_actions: int = 15,
    seed: int = 0,
    source: str = "policy",
    counts: Counts | None = None,
    make: Callable[..., Player] | None = None,
) -> Iterator[Episode]:
    """Plays every (task, variation) of `panel` once, yields episodes as they end; a free slot takes the next.

    g_k ~ pi^h, then (a_t, done_t) ~ pi^l and p_{t+1} ~ pi^p until the subtask ends  (STEP-HRL sec. 3; without
    pi^p GLIDER sec. 3.2). An episode: N turns, K of them in a subtask, N + 1 observations.

    judge(subtask, resulting obs) -> completed? fills verified_done; it ends the subtask with ends="judge".
    max_actions: cap on the actions of one subtask.
    seed: of the sampling; an episode's draws depend on (seed, task, variation, turn, role) alone.
    make(place in the panel, *what Player is made of): another player; then `panel` may repeat an episode.
    """
    counts = Counts() if counts is None else counts
    waiting, players = list(reversed(list(enumerate(panel)))), {}
    while waiting or players:
        free = [slot for slot in range(pool.size) if slot not in players][: len(waiting)]
        starts = {slot: waiting.pop() for slot in free}
        for slot, first in pool.call({slot: ("reset", *starts[slot][1]) for slot in starts}).items():
            place, (task, variation) = starts[slot]
            episode = Episode(env, task, variation, first.description, source=source)
            usual = episode, first, history, max_actions, seed, judge, ends
            players[slot] = make(place, *usual) if make else Player(*usual)
        slots = sorted(players)
        answers = policy.answer([players[slot].request() for slot in slots])
        actions = {}
        for slot, answer in zip(slots, answers, strict=True):
            if (action := players[slot].receive(answer, counts)) is not None:
                actions[slot] = ("step", action)
        for slot, result in pool.call(actions).items():
            players[slot].stepped(result, counts)
        for slot in slots:
            if players[slot].over:
                yield players.pop(slot).finished()
