"""Ours of the ten exercises in tasks.py. Try them first."""

import math
import re

import torch
from torch import Tensor


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    weight = torch.where(diff < 0, 1 - expectile, expectile)
    return (weight * diff.pow(2)).mean()


def option_target(rewards: list[float], gamma: float, terminated: bool, next_value: float) -> float:
    inside = sum(gamma**i * reward for i, reward in enumerate(rewards))
    return inside + (0.0 if terminated else gamma ** len(rewards) * next_value)


def awr_weight(advantage: Tensor, temperature: float, max_weight: float) -> Tensor:
    return (advantage.detach() / temperature).clamp(max=math.log(max_weight)).exp()


def logprob_gradient(logits: Tensor, token: int) -> Tensor:
    gradient = -logits.softmax(0)
    gradient[token] += 1
    return gradient


def answer_mask(prompt_tokens: list[int], answer_tokens: list[int], width: int) -> Tensor:
    first, count = torch.tensor(prompt_tokens)[:, None] - 1, torch.tensor(answer_tokens)[:, None]
    column = torch.arange(width)
    return (column >= first) & (column < first + count)


def executor_outcome(
    world_ended: bool, limit: bool, claimed: bool, verified: bool, understood: bool
) -> tuple[float, bool, bool]:
    terminated = world_ended or verified or claimed
    return float(verified) - (not understood), terminated, not terminated


def judge(subtask: str, feedback: str) -> bool:
    proofs = {
        r"find and take (\w+)": r"You pick up {0} \d+ from",
        r"clean (\w+)": r"You clean {0} \d+ using",
        r"heat (\w+)": r"You heat {0} \d+ using",
        r"cool (\w+)": r"You cool {0} \d+ using",
        r"put (\w+) in (\w+ \d+)": r"You move {0} \d+ to {1}\b",
        r"use (\w+)": r"You turn on {0} \d+",
    }
    for form, proof in proofs.items():
        if match := re.fullmatch(form, subtask):
            return re.match(proof.format(*match.groups()), feedback) is not None
    return False


def hierarchical_advantages(
    reward: Tensor,
    switch: Tensor,
    v_low: Tensor,
    v_high: Tensor,
    gamma: float,
    lam: float,
    lam_segment: float,
) -> tuple[Tensor, Tensor]:
    T = len(reward)
    starts = [0, *(t for t in range(1, T) if switch[t]), T]
    low, high = torch.zeros(T), torch.full((T,), torch.nan)
    behind = 0.0  # A_high of the next segment
    for begin, end in reversed(list(zip(starts[:-1], starts[1:], strict=True))):
        following = v_high[end] if end < T else 0.0
        carried, segment_reward = 0.0, 0.0
        for t in reversed(range(begin, end)):
            next_value = following if t == end - 1 else v_low[t + 1]
            carried = low[t] = reward[t] + gamma * next_value - v_low[t] + gamma * lam * carried
            segment_reward = reward[t] + gamma * segment_reward
        discount = gamma ** (end - begin)
        behind = segment_reward + discount * following - v_high[begin] + discount * lam_segment * behind
        high[begin] = behind
    return low, high


def temperature_for(advantage: Tensor, share: float) -> float:
    def share_at(temperature: float) -> float:
        weight = ((advantage - advantage.max()) / temperature).exp()  # a common factor cancels
        return (weight.sum() ** 2 / weight.pow(2).sum() / len(weight)).item()

    low, high = 1e-3, 1e3
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if share_at(middle) < share else (low, middle)
    return math.sqrt(low * high)


HUNT = {1: "R-G11", 2: "R-S2", 3: "R-G6", 4: "R-G4", 5: "R-S1", 6: "R-G7"}
# Where it shows: fault -> (file, line, the same with the fault, what gives it away).
FAULTS = {
    "R-G11": (
        "data.py", "enumerate(turns, start=segment.start)", "enumerate(turns[:-1], start=segment.start)",
        "the reward of a subtask comes with its last action: the executor's values and returns lose theirs",
    ),
    "R-S2": (
        "critic.py", "torch.where(diff < 0, 1 - expectile, expectile)",
        "torch.where(diff < 0, expectile, 1 - expectile)",
        "V ends up below the mean of Q: the advantages, and with them the weights, are larger on average",
    ),
    "R-G6": (
        "model.py",
        """model = PeftModel.from_pretrained(
            lm, folder / "adapter" / names[0], adapter_name=names[0], is_trainable=trainable
        )""",
        'model = add_lora(lm, meta["rank"])',
        "the log-probs of experts and rollouts begin far below those of SFT, kl_sft far above 0",
    ),
    "R-G4": (
        "readings.py", 'rl_levels: Trained = "all"', 'rl_levels: Trained = "planner"',
        "below the planner every weight is 0 or 1",
    ),
    "R-S1": (
        "learner.py", "awr_weight(advantage, config.temperature, config.max_weight)", "advantage.detach()",
        "weights are negative, and their mean is that of the advantages",
    ),
    "R-G7": (
        "learner.py", "count = round(sum_over_processes(sum(len(batch.level) for batch in batches)))",
        "count = len(batches[0].level)",
        "the gradients are as many times too large as there are micro-batches; no loss shows it",
    ),
}  # fmt: skip
