"""K candidate answers to one prompt as ONE row: [prompt | answer 1 | ... | answer K] under a tree mask.

K padded rows read the prompt K times. Here it is read once: an answer sees the prompt and itself, not the
other answers, and its positions count on from the prompt's end, so that every answer is scored as if it stood
alone. What this file does not do: sample (acting.Policy does) or train (learner.py).
Shapes: B prompts, T columns of the longest packed row, K answers at most.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from acting import Answer, Policy, Request
from critic import Critics
from logprob import head_weight, sequence_logprobs
from model import ROLES, hidden_states, lm_of


class Packed(NamedTuple):
    """B prompts with their answers, right-padded."""

    input_ids: Tensor  # (B, T)
    segment: Tensor  # (B, T): 0 on the prompt, k on answer k, -1 on padding


def pack(prompts: list[list[int]], answers: list[list[list[int]]], fill: int) -> Packed:
    """B prompts and up to K answers to each, as token ids -> Packed."""
    rows = [prompt + sum(group, []) for prompt, group in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    segments = [
        [0] * len(prompt) + [k for k, answer in enumerate(group, 1) for _ in answer]
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    return Packed(
        torch.tensor([row + [fill] * (width - len(row)) for row in rows]),
        torch.tensor([row + [-1] * (width - len(row)) for row in segments]),
    )


def tree_attention(lm, segment: Tensor) -> dict[str, Tensor]:
    """segment (B, T) -> what the backbone `lm` needs: attention_mask (B, 1, T, T), position_ids (B, T).

    The mask is additive, 0 or the smallest number: eager attention would add a bool mask as 0 and 1. Both are
    needed: from positions alone transformers takes the answers for separate documents.
    """
    T, window = segment.shape[1], getattr(lm.config, "sliding_window", None)
    if window and T > window:
        raise ValueError(
            f"packed rows of {T} tokens, but the model's sliding window is {window}, which the tree mask has "
            "not: use shorter prompts, fewer candidates, or a backbone without a window"
        )
    query, key, dtype = segment[:, :, None], segment[:, None, :], lm.get_output_embeddings().weight.dtype
    sees = ((key == query) | (key == 0)) & torch.ones(T, T, dtype=torch.bool, device=segment.device).tril()
    mask = torch.zeros(sees.shape, dtype=dtype, device=segment.device)
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": sees.sum(-1) - 1}  # as many as it sees before it


def predictor(segment: Tensor) -> Tensor:
    """(B, T) -> (B, T): the column that predicts each column; an answer's first token: the prompt's last."""
    column = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
    first = segment != segment.roll(1, 1)
    return torch.where(first, (segment == 0).sum(1, keepdim=True) - 1, column - 1)


def score_candidates(model, packed: Packed, level: Tensor | None = None, precision: str = "fp32"):
    """(log pi(answer k | prompt b), hidden states): (B, K) float32, 0 where there is no answer k; (B, T, D).

    One forward for all B K answers, with gradients; level (B,) picks among separate adapters.
    """
    segment, lm = packed.segment, lm_of(model)
    weight, bias = head_weight(lm.get_output_embeddings(), lm.config)
    hidden = hidden_states(model, packed.input_ids, level, precision, **tree_attention(lm, segment))
    per_token, _ = sequence_logprobs(
        hidden, weight, packed.input_ids, segment > 0, predictor(segment), bias=bias
    )
    K = int(segment.max())
    sums = per_token.new_zeros(len(segment), K + 1).scatter_add(1, segment.clamp_min(0), per_token)
    return sums[:, 1:], hidden


class BestOfK:
    """Acts as acting.Policy does, with the candidate of highest Q(s,a)  (IDQL, arXiv:2304.10573, acts so).

    Candidate 1 is the greedy answer, the other K - 1 are sampled at temperature 1.
    """

    def __init__(self, model, tokenizer, critics: Critics, K: int):
        self.model, self.critics, self.K = model, critics, K
        self.greedy = Policy(model, tokenizer)
        self.sampler = Policy(model, tokenizer, temperature=1.0, planning_ratio=1.0)

    def answer(self, requests: list[Request]) -> list[Answer]:
        """One Answer per Request, in order."""
        drawn = [self.greedy.answer(requests)]
        for k in range(1, self.K):
            drawn.append(self.sampler.answer([replace(r, seed=r.seed + k) for r in requests]))
        chosen = []
        for request, *answers in zip(requests, *drawn, strict=True):
            q = self.values(request, answers)
            chosen.append(answers[int(q.argmax())])  # the first of equals
        return chosen

    @torch.inference_mode()
    def values(self, request: Request, answers: list[Answer]) -> Tensor:
        """Q(s, answer k): (K,), all from one row."""
        packed = pack([self.greedy.encode(request.prompt)], [[answer.ids for answer in answers]], fill=0)
        device, level = next(self.model.parameters()).device, ROLES.index(request.role)
        segment = packed.segment.to(device)
        _, hidden = score_candidates(
            self.model, Packed(packed.input_ids.to(device), segment), torch.tensor([level], device=device)
        )
        last = (segment[0] > 0) & (segment[0] != torch.cat([segment[0, 1:], segment.new_tensor([-1])]))
        features = hidden[0, last]  # (K, D), at the last token of each answer
        return self.critics.q(features, torch.full((len(features),), level, device=device))
