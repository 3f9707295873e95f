"""Episodes per minute: one at a time through plain `generate`, then one saving after the other. For bench.py.

All variants play the same ALFWorld games with the same policy, greedily; those in float32 must give the same
actions. An untrained policy seldom ends its answers, so all are cut after as many tokens as a trained one's.
"""

import time
from contextlib import ExitStack
from itertools import product
from statistics import median
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import acting
import hierarchy
from acting import Answer, Policy, Request
from alfworld_rules import MAX_ACTIONS, judge
from envs import EnvPool, read_panel
from model import SHARED, add_lora, attention, lm_of, load_backbone
from run import seed_everything

TOKENS, STEPS = 10, 8  # of an answer; environment steps of an episode
LADDER = ["0 one episode, generate", "1 lockstep", "2 LoRA folded", "3 cached instruction", "4 bf16"]


class Generate(Policy):
    """Plain `generate`, one prompt at a time, as the papers' code does."""

    @torch.inference_mode()
    def answer(self, requests: list[Request]) -> list[Answer]:
        answers, eos = [], self.tokenizer.eos_token_id
        for request in requests:
            ids = self.encode(request.prompt)
            prompt = torch.tensor([ids], device=next(self.model.parameters()).device)
            out = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=request.max_new_tokens, eos_token_id=eos, pad_token_id=eos,
            )[0, len(ids) :].tolist()  # fmt: skip
            text = self.tokenizer.decode(out, skip_special_tokens=True)
            answers.append(Answer(text, out, [0.0] * len(out), len(ids)))
        return answers


def play(rung: int, policy, tokenizer, episodes: list) -> list[list[str]]:
    """Actions of each episode, with the savings up to this rung of the ladder."""
    player = (
        Policy(policy, tokenizer, precision="bf16" if rung == 4 else "fp32")
        if rung
        else Generate(policy, tokenizer)
    )
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.dict(hierarchy.MAX_NEW_TOKENS, dict.fromkeys(hierarchy.MAX_NEW_TOKENS, TOKENS))
        )
        if rung == 1:
            stack.enter_context(mock.patch.object(acting, "folded", lambda *_: {SHARED: lm_of(policy)}))
        if rung in (1, 2):
            stack.enter_context(mock.patch.object(acting, "instruction", lambda *_: ()))
        pool = stack.enter_context(EnvPool("alfworld", len(episodes) if rung else 1, 0, STEPS))
        stream = hierarchy.rollout(pool, episodes, player, judge, env="alfworld", max_actions=MAX_ACTIONS)
        done = {(e.task, e.variation): [turn.action for turn in e.turns] for e in stream}
    return [done[episode] for episode in episodes]


def compare(policy, tokenizer, rounds: int, many: int = 64, few: int = 2) -> list[dict]:
    """A row per rung: median episodes per minute of `rounds` interleaved rounds, and times that of rung 0.

    policy: a PeftModel in eval mode. few: episodes that rung 0 plays in a round, of the many that others do.
    """
    panel = read_panel("alfworld", "demo", "train", 11)[:many]
    rungs = [rung for rung in range(len(LADDER)) if rung < 4 or policy.dtype == torch.float32]
    minutes, actions = {rung: [] for rung in rungs}, {}
    for turn, rung in product(range(rounds + 1), rungs):  # the first round warms up and is checked
        episodes = panel if rung else panel[:few]
        began = time.perf_counter()
        actions[rung] = play(rung, policy, tokenizer, episodes)
        if turn:
            minutes[rung].append((time.perf_counter() - began) / 60 / len(episodes))
        elif rung < 4 and (found := actions[rung][:few]) != actions[0] and policy.dtype == torch.float32:
            raise ValueError(f"{LADDER[rung]} plays other actions than {LADDER[0]}: {found}, {actions[0]}")
    slowest = median(minutes[0])
    return [
        {
            "variant": LADDER[rung], "ratio": slowest / median(took), "episodes_per_minute": 1 / median(took),
            "seconds": 60 * median(took), "min": 60 * min(took), "max": 60 * max(took), "rounds": len(took),
        }
        for rung, took in minutes.items()
    ]  # fmt: skip


def random_policy(config, device: str, vocab: int):
    """A random Llama with a random adapter."""
    seed_everything(0)
    llama = LlamaConfig(
        vocab_size=vocab, hidden_size=config.hidden, intermediate_size=11 * config.hidden // 4,
        num_hidden_layers=config.layers, num_attention_heads=4, initializer_range=0.1, **attention(device),
    )  # fmt: skip
    return random_lora(LlamaForCausalLM(llama)).to(device)


def random_lora(lm):
    """With an adapter of rank 16 that is not zero, so that what it adds can be seen."""
    policy = add_lora(lm, rank=16)
    for parameter in (p for name, p in policy.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(parameter, std=0.02)
    return policy


def rollouts(config, device: str) -> list[dict]:
    """Episodes per minute of base with a random adapter, or of a random model that is bf16 on CUDA."""
    lm, tokenizer = load_backbone(config.model or "base", device)
    policy = random_lora(lm) if config.model else random_policy(config, device, len(tokenizer)).to(lm.dtype)
    return compare(policy.eval(), tokenizer, config.rounds)
