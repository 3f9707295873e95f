"""Checks of the exercises: `python -m pytest exercises`; EXERCISES=solutions checks ours instead of yours."""

import importlib
import itertools
import math
import os

import pytest
import torch

import alfworld_rules
import annotate
import critic
import scripted
from batches import encode
from data import Episode, Segment, Turn, transitions
from envs import EnvPool, read_panel
from prompts import compact

mine = importlib.import_module(os.environ.get("EXERCISES", "tasks"))
T = torch.tensor


def test_1_expectile():
    assert float(mine.expectile_loss(T([-1.0, 2.0]), 0.7)) == pytest.approx((0.3 * 1 + 0.7 * 4) / 2)
    u = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert float(mine.expectile_loss(u, 0.5)) == pytest.approx(float((u**2).mean() / 2))
    assert float(mine.expectile_loss(u, 0.9)) == pytest.approx(float(critic.expectile_loss(u, 0.9)))


def test_2_option():
    assert mine.option_target([0.0, 0.0, 1.0], 0.5, True, 9.0) == pytest.approx(0.25)
    assert mine.option_target([0.0, 0.0, 1.0], 0.5, False, 8.0) == pytest.approx(0.25 + 0.125 * 8)
    assert mine.option_target([2.0], 0.9, False, 1.0) == pytest.approx(2.9), "one step: the usual target"


def test_3_awr():
    advantage = T([-1.0, 0.0, 1.0, 1e6], requires_grad=True)
    weight = mine.awr_weight(advantage, 0.5, 20.0)
    assert weight.tolist() == pytest.approx([math.exp(-2), 1.0, math.exp(2), 20.0], rel=1e-5)
    assert not weight.requires_grad and advantage.tolist()[3] == 1e6
    assert mine.awr_weight(advantage, math.inf, 20.0).tolist() == [1.0] * 4


def test_4_logprob_gradient():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits.log_softmax(0)[3].backward()
    given = logits.detach().clone()
    found = mine.logprob_gradient(given, 3)
    assert torch.allclose(found, logits.grad, atol=1e-6) and torch.equal(given, logits.detach())


class Letters:
    """A tokenizer of one token per letter; EOS pads, as in many real ones."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __call__(self, text, add_special_tokens=False):
        return type("", (), {"input_ids": [ord(letter) for letter in text]})


def test_5_mask():
    pairs = [
        encode(Letters(), prompt, answer) for prompt, answer in (("go", " ab"), ("look", " c"), ("", "d"))
    ]
    width = max(len(p) + len(a) for p, a in pairs)
    rows = T([p + a + [Letters.pad_token_id] * (width - len(p) - len(a)) for p, a in pairs])
    mask = mine.answer_mask([len(p) for p, _ in pairs], [len(a) for _, a in pairs], width)
    assert mask.shape == rows.shape and mask.dtype == torch.bool and not mask[:, -1].any()
    for row, own, (_, answer) in zip(rows, mask, pairs, strict=True):
        assert row[1:][own[:-1]].tolist() == answer, "the answer with its EOS, and neither prompt nor padding"


@pytest.mark.parametrize("case", list(itertools.product([False, True], repeat=5)))
def test_6_outcome(case):
    ended, limit, claimed, verified, understood = case
    limit = limit and not ended  # a world that has ended is not cut off
    turn = Turn("o", "a", "", 0.0, ended, limit, subtask="s", claimed_done=claimed, verified_done=verified)
    feedback = "You look around." if understood else "No known action matches that input."
    episode = Episode("scienceworld", "boil", 1, "d", [turn], [Segment("s", 0, 1, "p")], feedback)
    (ours,) = [t for t in transitions(episode) if t.level == "executor"]
    assert mine.executor_outcome(ended, limit, claimed, verified, understood) == (
        ours.reward, ours.terminated, ours.truncated,
    )  # fmt: skip


def test_7_judge():
    with EnvPool("alfworld", 6, workers=0, max_steps=50) as pool:
        played = scripted.play_gold(pool, read_panel("alfworld", "demo", "train", 1), "alfworld")
        episodes = [annotate.annotate(e) for e in played if " two " not in e.description]
    names = {
        segment.subtask for e in episodes for segment in e.segments if ", not from" not in segment.subtask
    }
    names |= {"put mug in shelf 1", "find and take pan", "try another action"}
    verdicts = set()
    observations = [e.obs_after(i) for e in episodes for i in range(len(e.turns))]
    for obs, subtask in itertools.product(observations, sorted(names)):
        feedback, ours = compact(obs.split("\n\n")[0]), alfworld_rules.judge(subtask, obs)
        assert mine.judge(subtask, feedback) == ours, (subtask, feedback)
        verdicts.add((subtask.split()[0], ours))
    assert {("find", True), ("put", True), ("put", False)} <= verdicts
    assert not mine.judge("put mug in shelf 1", "You move mug 1 to shelf 12")


def test_8_hae():
    reward, switch = T([0.0, 0, 0, 0, 0, 1]), T([1, 0, 1, 0, 0, 1]).bool()
    v_low, v_high = T([0.30, 0.40, 0.45, 0.55, 0.65, 0.80]), T([0.25, 0.35, 0.50, 0.60, 0.70, 0.75])
    for gamma, lam in ((0.9, 0.95), (1.0, 1.0), (0.99, 0.0)):
        low, high = mine.hierarchical_advantages(reward, switch, v_low, v_high, gamma, lam, 0.95)
        ours = critic.hierarchical_gae(reward, switch, v_low, v_high, gamma, lam, 0.95)
        assert torch.allclose(low, ours[0], atol=1e-6)
        assert torch.allclose(high, ours[1], atol=1e-6, equal_nan=True)
    low, high = mine.hierarchical_advantages(reward, torch.ones(6).bool(), v_low, v_low, 0.9, 0.8, 0.8)
    assert torch.allclose(low, reward + 0.9 * T([*v_low[1:], 0.0]) - v_low, atol=1e-6), "one-turn segments"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_9_temperature(share):
    advantage = torch.randn(200, generator=torch.Generator().manual_seed(2))
    temperature = mine.temperature_for(advantage, share)
    weight = (advantage / temperature).double().exp()
    assert critic.effective_sample_size(weight).item() / 200 == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("number", range(1, 7))
def test_10_hunt(number):
    assert mine.HUNT[number], "run `python exercises/hunt.py N` and name the fault in HUNT"
    assert mine.HUNT[number] == importlib.import_module("solutions").HUNT[number], "look again"
