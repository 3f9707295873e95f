"""learner.py on a tiny random Llama with LoRA: where gradients go, what each field does, learning."""

import copy
import dataclasses
import functools
import math
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from batches import Batch
from critic import Critics
from data import LEVELS
from learner import Learner, RLConfig, actor_loss, losses

torch.set_num_threads(1)
V, D, EOS = 64, 16, 2


@functools.cache
def _base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def make_policy(lora=True, **lora_options):
    policy = copy.deepcopy(_base())
    if lora:
        torch.manual_seed(1)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]} | lora_options
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():  # the usual zero would hide that hidden states depend on the adapter
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    return policy


def hidden_states(policy, input_ids, level, **inputs):
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return model.model(input_ids=input_ids, **inputs).last_hidden_state


def make_learner(policy=None, **config):
    torch.manual_seed(2)
    return Learner(policy or make_policy(), Critics(D), hidden_states, RLConfig(**config))


def pad(rows, extra=0, fill=0):
    width = max(map(len, rows)) + extra
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


class Row(NamedTuple):
    """A decision as tokens."""

    prompt: list[int]
    answer: list[int]
    next_prompt: list[int]
    level: int  # index into LEVELS
    reward: float
    steps: int
    terminated: bool
    next_answer: list[int] = []  # what followed in the data; empty: nothing
    next_level: int | None = None  # None: its own
    expert: bool = True
    behavior_logp: float = math.nan
    mc_return: float = math.nan
    policy_answer: list[int] | None = None  # sampled by the policy now; None: not asked for


def make_batch(decisions, extra=0, fill=0):
    """decisions: Row, or the first fields of one; extra columns hold `fill`."""
    rows = [Row(*decision) for decision in decisions]
    both = [(r.prompt, r.answer, r.policy_answer or []) for r in rows]
    segments = [[0] * len(prompt) + [1] * len(a) + [2] * len(u) for prompt, a, u in both]
    return Batch(
        input_ids=pad([prompt + a + u for prompt, a, u in both], extra, fill),
        segment=pad(segments, extra, fill=-1),
        state_index=torch.tensor([len(prompt) - 1 for prompt, a, u in both]),
        action_index=torch.tensor([len(prompt + a) - 1 for prompt, a, u in both]),
        policy_index=torch.tensor([len(prompt + a + u) - 1 if u else -1 for prompt, a, u in both]),
        next_ids=pad([r.next_prompt + r.next_answer for r in rows], extra, fill),
        next_index=torch.tensor([len(r.next_prompt) - 1 for r in rows]),
        next_action_index=torch.tensor(
            [len(r.next_prompt + r.next_answer) - 1 if r.next_answer else -1 for r in rows]
        ),
        next_level=torch.tensor([r.level if r.next_level is None else r.next_level for r in rows]),
        level=torch.tensor([r.level for r in rows]),
        reward=torch.tensor([r.reward for r in rows]),
        steps=torch.tensor([r.steps for r in rows]),
        terminated=torch.tensor([r.terminated for r in rows]),
        expert=torch.tensor([r.expert for r in rows]),
        behavior_logp=torch.tensor([r.behavior_logp for r in rows]),
        mc_return=torch.tensor([r.mc_return for r in rows]),
    )


def ragged_decisions(count=8, levels=(0, 1, 2)):
    """Rows of all lengths: a fourth ends, a third has no answer after it, half are from rollouts."""
    generator = torch.Generator().manual_seed(3)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, V, (length,), generator=generator).tolist()

    return [
        Row(
            prompt=tokens(2, 9),
            answer=tokens(1, 5) + [EOS],
            next_prompt=tokens(2, 9),
            level=levels[i % len(levels)],
            reward=float(i % 2),
            steps=i,
            terminated=i % 4 == 3,
            next_answer=tokens(1, 5) + [EOS] if i % 3 else [],
            expert=i % 4 < 2,
            behavior_logp=math.nan if i % 4 < 2 else -3.0 - i,
            mc_return=0.1 * i if i % 5 else math.nan,
            policy_answer=tokens(1, 5) + [EOS],
        )
        for i in range(count)
    ]


def parameters(learner):
    return {
        **{f"policy.{n}": p.detach().clone() for n, p in learner.policy.named_parameters()},
        **{f"critics.{n}": p.detach().clone() for n, p in learner.critics.named_parameters()},
    }


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# --- where gradients go -----------------------------------------------------------------------------------
def test_one_step_moves_the_adapter_the_heads_and_nothing_else():
    learner = make_learner()
    before = parameters(learner)
    learner.update([make_batch(ragged_decisions())])
    moved = changed(before, parameters(learner))
    expected = {n for n in before if "lora_" in n or n.startswith("critics.")}
    assert moved == expected  # base weights untouched


def test_critic_losses_do_not_reach_the_backbone_nor_the_actor_loss_the_heads():
    learner = make_learner()
    decisions = learner.decide(make_batch(ragged_decisions()))
    loss = losses(decisions, learner.config, count=8)
    (loss["v_loss"] + loss["q_loss"]).backward()
    assert all(p.grad is None for p in learner.policy.parameters())
    for p in learner.critic_parameters:
        assert p.grad is not None
        p.grad = None
    loss["actor_loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in learner.actor_parameters)
    assert all(p.grad is None for p in learner.critic_parameters)


def test_v_loss_trains_v_and_q_loss_trains_q():
    learner = make_learner()
    loss = losses(learner.decide(make_batch(ragged_decisions())), learner.config, count=8)
    loss["v_loss"].backward()
    assert all(p.grad is None for p in learner.critics.online.q.parameters())
    assert all(p.grad is not None for p in learner.critics.online.v.parameters())
    learner.critic_optimizer.zero_grad()
    loss["q_loss"].backward()
    assert all(p.grad is None for p in learner.critics.online.v.parameters())
    assert all(p.grad is not None for p in learner.critics.online.q.parameters())


def test_critic_warm_up_leaves_the_policy_alone():
    learner = make_learner()
    before = parameters(learner)
    metrics = learner.update([make_batch(ragged_decisions())], train_actor=False)
    moved = changed(before, parameters(learner))
    assert moved == {n for n in before if n.startswith("critics.")}
    assert "actor/grad_norm" not in metrics and not learner.actor_optimizer.state
    warm = learner.decide(make_batch(ragged_decisions()), train_actor=False)
    assert not warm.logp.requires_grad and warm.v.requires_grad


def test_full_fine_tuning_trains_the_head_too():
    learner = make_learner(make_policy(lora=False))
    before = parameters(learner)
    learner.update([make_batch(ragged_decisions())])
    moved = changed(before, parameters(learner))
    assert {"policy.lm_head.weight", "policy.model.layers.0.self_attn.q_proj.weight"} <= moved


def test_critic_and_actor_are_clipped_apart():
    decisions = ragged_decisions()
    huge = [d._replace(reward=1e4) for d in decisions]  # rewards that make the critic gradient explode
    steps = []
    for batch in (make_batch(decisions), make_batch(huge)):
        learner = make_learner(actor="bc", clip_norm=0.5)
        metrics = learner.update([batch])
        steps.append((metrics, parameters(learner)))
    (small, after_small), (large, after_large) = steps
    assert large["critic/grad_norm"] > 100 * small["critic/grad_norm"]
    assert large["actor/grad_norm"] == small["actor/grad_norm"]
    assert all(torch.equal(after_small[n], after_large[n]) for n in after_small if n.startswith("policy."))


def test_gradients_are_those_of_hugging_face_for_behaviour_cloning():
    """With actor="bc" the actor loss is the summed cross-entropy of the answers / decisions."""
    learner = make_learner(actor="bc")
    batch = make_batch(ragged_decisions())
    ours = losses(learner.decide(batch), learner.config, count=8)["actor_loss"]
    labels = torch.where(batch.action_mask, batch.input_ids, -100)
    output = learner.policy(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=labels
    )
    theirs = output.loss * batch.action_mask.sum() / 8
    torch.testing.assert_close(ours, theirs)
    a = torch.autograd.grad(ours, learner.actor_parameters)
    b = torch.autograd.grad(theirs, learner.actor_parameters)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train_actor", [True, False])
@pytest.mark.parametrize("reading", [{}, {"value_answers": "policy"}, {"actor": "td3_bc"}], ids=str)
def test_an_update_is_one_forward_with_a_gradient_and_one_without(reading, train_actor):
    learner, calls, hidden_fn = make_learner(**reading), [], hidden_states

    def counted(*args, **inputs):
        calls.append(torch.is_grad_enabled())
        return hidden_fn(*args, **inputs)

    learner.hidden_fn = counted
    learner.update([make_batch(ragged_decisions())], train_actor)
    measures_q = reading.get("actor") == "td3_bc" and train_actor  # mean |Q| of the batch comes first
    assert calls == [False] * measures_q + [False, train_actor]


# --- micro-batches, padding, resuming ---------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3])  # 3 + 3 + 2: unequal shares
@pytest.mark.parametrize("token_norm", ["sum", "mean"])
def test_micro_batches_equal_one_batch(size, token_norm):
    whole, split = make_learner(token_norm=token_norm), make_learner(token_norm=token_norm)
    decisions = ragged_decisions()
    metrics = whole.update([make_batch(decisions)])
    parts = [make_batch(decisions[i : i + size]) for i in range(0, 8, size)]  # each padded to its own width
    metrics_of_parts = split.update(parts)
    assert metrics == pytest.approx(metrics_of_parts, rel=1e-4, abs=1e-5)
    for a, b in zip(whole.actor_parameters, split.actor_parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
    # Adam divides by |gradient|, so where that is rounding noise steps may differ by a part of the step size.
    assert_same(parameters(whole), parameters(split), atol=2e-5, rtol=1e-4)


def test_split_of_a_batch_equals_the_batch():
    whole, split = make_learner(), make_learner()
    batch = make_batch(ragged_decisions())
    assert whole.update([batch]) == pytest.approx(split.update(batch.split(2)), rel=1e-4, abs=1e-5)


def test_right_padding_changes_nothing():
    learner = make_learner()
    decisions = ragged_decisions()
    plain, padded = (learner.decide(make_batch(decisions, extra=extra, fill=17)) for extra in (0, 5))
    for name, a, b in zip(plain._fields, plain, padded, strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_batch_is_unchanged():
    batch = make_batch(ragged_decisions())
    before = copy.deepcopy(batch)
    make_learner().update([batch])
    for field in dataclasses.fields(batch):
        after, was = getattr(batch, field.name), getattr(before, field.name)
        torch.testing.assert_close(after, was, atol=0, rtol=0, equal_nan=True, msg=field.name)


def test_resumed_run_equals_uninterrupted_run():
    batch = make_batch(ragged_decisions())
    learner = make_learner()
    learner.update([batch])
    policy, critics, state = map(copy.deepcopy, (learner.policy, learner.critics, learner.state_dict()))
    resumed = Learner(policy, critics, hidden_states, learner.config)
    resumed.load_state_dict(state)
    forgetful = Learner(*map(copy.deepcopy, (policy, critics)), hidden_states, learner.config)
    for each in (learner, resumed, forgetful):
        each.update([batch])
    assert not changed(parameters(learner), parameters(resumed))
    assert changed(parameters(learner), parameters(forgetful))  # the optimizer state matters


# --- values -----------------------------------------------------------------------------------------------
def test_v_reads_the_prompt_and_q_the_answer():
    learner = make_learner()
    prompt, rest = [5, 6, 7], ([9, 9], 0, 0.0, 1, False)
    answers = [[10, 11, EOS], [12, 11, EOS], [10, 13, EOS]]
    d = learner.decide(make_batch([(prompt, answer, *rest) for answer in answers]))
    torch.testing.assert_close(d.v, d.v[:1].expand(3))  # same prompt, same V
    assert d.q.unique().numel() == 3
    other = learner.decide(make_batch([([5, 6, 8], answers[0], *rest)]))
    assert not torch.isclose(other.v, d.v[0]).any()


def test_v_and_q_read_the_last_token_of_prompt_and_answer():
    learner = make_learner()
    batch = make_batch([([5, 6, 7], [10, 11, EOS], [9, 9], 1, 0.0, 1, False)])
    d = learner.decide(batch)
    hidden = hidden_states(learner.policy, torch.tensor([[5, 6, 7]]), None)
    torch.testing.assert_close(d.v, learner.critics.v(hidden[:, -1], batch.level))
    hidden = hidden_states(learner.policy, torch.tensor([[5, 6, 7, 10, 11, EOS]]), None)
    torch.testing.assert_close(d.q, learner.critics.q(hidden[:, -1], batch.level))
    torch.testing.assert_close(d.v_target, learner.critics.target_q(hidden[:, -1], batch.level))


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    learner = make_learner(gamma=0.9)
    head = ([5, 6, 7], [10, EOS])

    def target(next_prompt, terminated):
        return learner.decide(make_batch([(*head, next_prompt, 0, 0.5, 3, terminated)])).td_target.item()

    assert target([20, 21], True) == target([30, 31, 32], True) == 0.5
    assert target([20, 21], False) != target([30, 31, 32], False)
    hidden = hidden_states(learner.policy, torch.tensor([[30, 31, 32]]), None)
    value = learner.critics.target_v(hidden[:, -1], torch.tensor([0])).item()
    assert target([30, 31, 32], False) == pytest.approx(0.5 + 0.9 * value, abs=1e-5)


def test_discount_mode_decides_what_a_long_subtask_costs():
    batch = make_batch([([5, 6, 7], [10, EOS], [20, 21], 0, 0.0, 3, False)])
    subtask = make_learner(gamma=0.9, discount="subtask").decide(batch).td_target
    smdp = make_learner(gamma=0.9, discount="smdp").decide(batch).td_target
    torch.testing.assert_close(smdp, subtask * 0.9**2)


def test_bootstrap_reads_the_target_heads_and_v_regresses_to_target_q():
    learner, batch = make_learner(), make_batch(ragged_decisions())
    before = learner.decide(batch)
    with torch.no_grad():
        for p in learner.critics.target.parameters():
            p.add_(0.1)
    after = learner.decide(batch)
    assert torch.equal(before.v, after.v) and torch.equal(before.q, after.q)
    assert (before.v_target != after.v_target).all()
    assert ((before.td_target != after.td_target) == ~batch.terminated).all()
    torch.testing.assert_close(before.advantage, (before.q - before.v).detach())


@pytest.mark.parametrize("polyak", [0.0, 0.2, 1.0])
def test_target_follows_the_updated_heads_by_polyak(polyak):
    learner = make_learner(polyak=polyak)
    old = copy.deepcopy(learner.critics.target)
    learner.update([make_batch(ragged_decisions())])
    pairs = zip(
        learner.critics.target.parameters(),
        old.parameters(),
        learner.critics.online.parameters(),
        strict=True,
    )
    for target, before, online in pairs:
        torch.testing.assert_close(target, (1 - polyak) * before + polyak * online.detach())


# --- policy -----------------------------------------------------------------------------------------------
def test_actor_loss_by_hand():
    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = actor_loss(logp, torch.tensor([2.0, 0.5]))
    assert loss.item() == (2 * 1 + 0.5 * 3) / 2
    loss.backward()
    assert logp.grad.tolist() == [-1.0, -0.25]
    assert actor_loss(logp, torch.tensor([2.0, 0.5]), count=7).item() == pytest.approx(0.5)


def test_weight_zero_never_meets_minus_infinity():
    logp = torch.tensor([-1.0, -math.inf], requires_grad=True)
    loss = actor_loss(logp, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 0.5 and logp.grad.tolist() == [-0.5, 0.0]


def test_infinite_temperature_is_behaviour_cloning():
    batch = make_batch(ragged_decisions())

    def gradients(**config):
        learner = make_learner(**config)
        losses(learner.decide(batch), learner.config, count=8)["actor_loss"].backward()
        return [p.grad for p in learner.actor_parameters]

    cloning = gradients(actor="bc")
    torch.testing.assert_close(gradients(temperature=math.inf), cloning)
    weighted = gradients(temperature=0.1)
    assert all(not torch.allclose(a, b) for a, b in zip(weighted, cloning, strict=True))


def test_token_norm_mean_divides_by_answer_length():
    batch = make_batch(ragged_decisions())
    total, mean = (make_learner(token_norm=norm).decide(batch) for norm in ("sum", "mean"))
    torch.testing.assert_close(mean.logp * batch.action_mask.sum(1), total.logp)
    assert (mean.logp != total.logp).all()


def test_max_weight_bounds_the_weight():
    batch = make_batch(ragged_decisions())
    free = make_learner(temperature=1e-3, max_weight=1e6).decide(batch).weight
    bounded = make_learner(temperature=1e-3, max_weight=3.0).decide(batch).weight
    assert free.max() > 3 and bounded.max().item() == pytest.approx(3.0)


# --- metrics and errors -----------------------------------------------------------------------------------
@pytest.mark.parametrize("token_norm", ["sum", "mean"])
def test_metrics_of_the_levels_that_occur(token_norm):
    learner = make_learner(token_norm=token_norm)
    batch = make_batch(ragged_decisions(levels=(0, 2)))
    logp = make_learner(token_norm="sum").decide(batch).logp
    d = learner.decide(batch)
    metrics = learner.update([batch])
    assert {name.partition("/")[0] for name in metrics} == {"planner", "progress", "actor", "critic"}
    always = """v_loss q_loss actor_loss value_mean q_mean advantage_mean advantage_p50 weight_mean weight_max
        weight_p95 ess_share logp_mean logp_expert logp_rollout kl_sft mc_bias"""
    for level in ("planner", "progress"):
        assert set(always.split()) <= {name.partition("/")[2] for name in metrics if name.startswith(level)}
    assert not any("cql_loss" in name or "pg_loss" in name for name in metrics)  # they are off
    for index in (0, 2):
        rows = batch.level == index
        mean_logp = (logp[rows].sum() / batch.action_mask[rows].sum()).item()
        assert metrics[f"{LEVELS[index]}/logp_mean"] == pytest.approx(mean_logp, rel=1e-5)
        assert metrics[f"{LEVELS[index]}/value_mean"] == pytest.approx(d.v[rows].mean().item(), rel=1e-4)
        squared = (d.td_target - d.q)[rows].pow(2).mean().item()
        assert metrics[f"{LEVELS[index]}/q_loss"] == pytest.approx(squared, rel=1e-4)
        weight = d.weight[rows]
        share = (weight.sum() ** 2 / (weight**2).sum() / rows.sum()).item()
        assert metrics[f"{LEVELS[index]}/ess_share"] == pytest.approx(share, rel=1e-4)
        sampled = rows & ~batch.expert  # KL(SFT || policy): of whole answers, whatever the norm
        drift = (batch.behavior_logp - logp)[sampled].mean().item()
        assert metrics[f"{LEVELS[index]}/kl_sft"] == pytest.approx(drift, rel=1e-4)


def test_absent_level_keeps_its_heads():
    learner = make_learner()
    before = parameters(learner)
    learner.update([make_batch(ragged_decisions(levels=(1,)))])
    moved = changed(before, parameters(learner))
    assert any("executor" in n for n in moved) and not any("planner" in n or "progress" in n for n in moved)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_learner(make_policy().requires_grad_(False))
    with pytest.raises(ValueError, match="expected a plain nn.Linear"):
        make_learner(make_policy(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="start a new critic"):
        Learner(make_policy(), Critics(D, ("low", "high")), hidden_states, RLConfig())
    for wrong in ({"expectile": 1.0}, {"temperature": 0.0}, {"max_weight": 0.0}, {"conservative": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RLConfig(**wrong)


def test_a_reading_that_samples_names_what_its_batch_lacks():
    batch = make_batch([Row(*row[:7]) for row in ragged_decisions()])
    with pytest.raises(ValueError, match="policy_answers="):
        make_learner(conservative=1.0).update([batch])


def test_nan_stops_the_run_before_it_reaches_a_weight():
    learner = make_learner()
    before = parameters(learner)
    batch = make_batch(ragged_decisions())
    batch.reward[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.update([batch])
    assert not changed(before, parameters(learner))


# --- learning ---------------------------------------------------------------------------------------------
def test_bandit_prefers_the_rewarded_answer_by_its_advantage():
    """pi(a) -> mu(a) exp(A(a) / temperature): Q = 1 and 0 give log odds 1 / temperature; cloning: 0."""
    prompt, good, bad = [5, 6, 7], [10, EOS], [11, EOS]  # both once in the data, so mu is even
    batch = make_batch([(prompt, good, [9], 1, 1.0, 1, True), (prompt, bad, [9], 1, 0.0, 1, True)])
    log_odds = {}
    torch.manual_seed(2)
    for actor in ("bc", "awr"):
        policy = make_policy(lora=False)  # the frozen head of so small a model cannot express the optimum
        config = RLConfig(actor=actor, temperature=0.5, expectile=0.5, actor_lr=3e-3, critic_lr=3e-3)
        learner = Learner(policy, Critics(D), hidden_states, config)
        for step in range(260):
            learner.update([batch], train_actor=step >= 50)
        d = learner.decide(batch)
        log_odds[actor] = (d.logp[0] - d.logp[1]).item()
        assert d.q.tolist() == pytest.approx([1.0, 0.0], abs=0.1)
        assert d.v[0].item() == pytest.approx(0.5, abs=0.1)
    assert log_odds["bc"] == pytest.approx(0.0, abs=0.2)
    assert log_odds["awr"] == pytest.approx(2.0, abs=0.2)
