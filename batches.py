"""Decisions as tokens: encode, collate into right-padded batches, split by length, draw at a fixed ratio.

Prompt and completion are encoded apart and their ids concatenated; what a policy sampled is never encoded
again. What this file does not do: build a prompt (progress.py) or compute a loss (learner.py).
"""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from candidates import pack
from data import LEVELS, Transition
from model import prompt_ids, text_ids


@dataclass
class Batch:
    """B decisions as right-padded tokens; T: longest row, T2: longest next prompt (candidates.pack)."""

    input_ids: Tensor  # (B, T): prompt, completion with its EOS, and the policy's own answer if asked for
    segment: Tensor  # (B, T): 0 on the prompt, 1 on the completion, 2 on that answer, -1 on padding
    state_index: Tensor  # (B,) last token of the prompt: V reads here
    action_index: Tensor  # (B,) last token of the completion: Q reads here
    policy_index: Tensor  # (B,) last token of the policy's own answer; -1 where there is none
    next_ids: Tensor  # (B, T2)
    next_index: Tensor  # (B,) last token of the next prompt
    next_action_index: Tensor  # (B,) last token of the answer that follows it; -1 where there is none
    next_level: Tensor  # (B,) index into LEVELS: whose value follows
    level: Tensor  # (B,) index into LEVELS
    reward: Tensor  # (B,)
    steps: Tensor  # (B,) environment steps spanned
    terminated: Tensor  # (B,) bool: no bootstrap
    expert: Tensor  # (B,) bool: an expert's decision, not a rollout's
    behavior_logp: Tensor  # (B,) log pi of the answer when it was sampled; nan for an expert
    mc_return: Tensor  # (B,) Monte-Carlo return; nan where it is not known

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool: not padding."""
        return self.segment >= 0

    @property
    def action_mask(self) -> Tensor:
        """(B, T) bool: the completion, its EOS included."""
        return self.segment == 1

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` decisions, in order."""
        columns = [getattr(self, f.name).split(size) for f in dataclasses.fields(self)]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]


def encode(
    tokenizer, prompt: str, completion: str, completion_ids: list[int] = ()
) -> tuple[list[int], list[int]]:
    """Prompt ids (with BOS, once) and completion ids (EOS appended); sampled ids are never encoded again."""
    given = prompt_ids(tokenizer, prompt)
    return given, list(completion_ids) or [*text_ids(tokenizer, completion), tokenizer.eos_token_id]


def _pad(rows: list[list[int]], fill: int) -> Tensor:
    """(B, T) ids, padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def collate(
    items: list[Transition],
    tokenizer,
    next_answers: bool = False,
    policy_answers: dict[int, list[int]] | None = None,
) -> Batch:
    """Decisions -> Batch. One token, never read, stands in for the next prompt of a terminated decision.

    next_answers: append to the next prompt the answer that followed in the data (for Q(s', a')).
    policy_answers: id(decision) -> ids that the policy sampled for its prompt (GLIDER eq. 5).
    """
    pairs = [encode(tokenizer, t.prompt, t.completion, t.completion_ids) for t in items]
    nexts = [encode(tokenizer, t.next_prompt, "")[0] or [tokenizer.eos_token_id] for t in items]
    follows = [t.follows if next_answers else None for t in items]
    answers = [encode(tokenizer, "", f.completion, f.completion_ids)[1] if f else [] for f in follows]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    own = [policy_answers[id(t)] if policy_answers is not None else [] for t in items]
    packed = pack([p for p, _ in pairs], [[c, u] for (_, c), u in zip(pairs, own, strict=True)], pad)
    next_ids = _pad([n + a for n, a in zip(nexts, answers, strict=True)], pad)
    return Batch(
        input_ids=packed.input_ids,
        segment=packed.segment,
        state_index=torch.tensor([len(p) - 1 for p, _ in pairs]),
        action_index=torch.tensor([len(p) + len(c) - 1 for p, c in pairs]),
        policy_index=torch.tensor(
            [len(p) + len(c) + len(u) - 1 if u else -1 for (p, c), u in zip(pairs, own, strict=True)]
        ),
        next_ids=next_ids,
        next_index=torch.tensor([len(n) - 1 for n in nexts]),
        next_action_index=torch.tensor(
            [len(n) + len(a) - 1 if a else -1 for n, a in zip(nexts, answers, strict=True)]
        ),
        next_level=torch.tensor([LEVELS.index(t.next_level) for t in items]),
        level=torch.tensor([LEVELS.index(t.level) for t in items]),
        reward=torch.tensor([t.reward for t in items], dtype=torch.float32),
        steps=torch.tensor([t.steps for t in items]),
        terminated=torch.tensor([t.terminated for t in items]),
        expert=torch.tensor([t.source == "expert" for t in items]),
        behavior_logp=torch.tensor([sum(t.behavior_logprobs) if t.behavior_logprobs else nan for t in items]),
        mc_return=torch.tensor([t.mc_return for t in items], dtype=torch.float32),
    )


def micro_batches(
    items: list[Transition], tokenizer, max_tokens: int, policy_answers: dict[int, list[int]] | None = None
) -> list[list[Transition]]:
    """Groups of like length, at most max_tokens padded tokens of prompt + answers each: little padding."""
    lengths = {
        id(t): sum(map(len, encode(tokenizer, t.prompt, t.completion, t.completion_ids)))
        + (len(policy_answers[id(t)]) if policy_answers else 0)
        for t in items
    }
    return by_length(items, lambda t: lengths[id(t)], max_tokens)


def by_length(items: list, length: Callable, max_tokens: int) -> list[list]:
    """Groups of like length(item), at most max_tokens padded tokens each."""
    groups = [[]]
    for item in sorted(items, key=length):
        if groups[-1] and length(item) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


# --- sampling -------------------------------------------------------------------------------------------
class Mixture:
    """Endless batches drawn from named pools at fixed ratios, e.g. {"expert": 1, "rollouts": 2} (GLIDER).

    Every pool is walked in its own seeded order, reshuffled each time it is used up. state_dict() makes it
    resumable.
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
