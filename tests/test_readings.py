"""Every reading of readings.RLConfig: by hand or against a slow reference, and what its knob leaves alone."""

import copy
import dataclasses
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learner import (
    EOS,
    Row,
    V,
    _base,
    assert_same,
    changed,
    hidden_states,
    make_batch,
    make_learner,
    make_policy,
    parameters,
    ragged_decisions,
)

from data import LEVELS, Credit
from learner import Decisions, actor_weight, losses, policy_gradient_loss
from readings import PRESETS, Actor, RLConfig

PLANNER, EXECUTOR, PROGRESS = range(3)
# One entry per value that is not a default; together they reach every branch of the step.
READINGS = {
    "default": {},
    "smdp": {"discount": "smdp"},
    "lower": {"expectile_side": "lower"},
    "policy answers": {"value_answers": "policy"},
    "prompt": {"value_reads": "prompt"},
    "next_q": {"bootstrap": "next_q"},
    "conservative": {"conservative": 0.5},
    "frozen": {"features": "frozen"},
    "frozen, policy answers, next_q": {
        "features": "frozen",
        "value_answers": "policy",
        "bootstrap": "next_q",
    },
    "q_weighted": {"actor": "q_weighted"},
    "signed_advantage": {"actor": "signed_advantage"},
    "bc": {"actor": "bc"},
    "td3_bc": {"actor": "td3_bc"},
    "return": {"advantage": "return"},
    "rl_levels": {"rl_levels": "planner"},
    "mean": {"token_norm": "mean"},
    "td3_bc, mean": {"actor": "td3_bc", "token_norm": "mean"},
} | {name: preset["rl"] for name, preset in PRESETS.items() if preset["rl"]}
every_reading = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS.keys())


def learner_of(clip_norm=1e9, **config):
    """A learner whose target heads differ from the online ones, and whose gradients are not clipped."""
    learner = make_learner(clip_norm=clip_norm, **config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in learner.critics.target.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return learner


def shift(heads, level, by):
    """Adds `by` to what one head says everywhere."""
    with torch.no_grad():
        heads[LEVELS[level]][-1].bias.add_(by)


def features(learner, ids):
    """The last hidden state of one sequence, (D,); frozen: of a backbone that never had an adapter."""
    frozen = learner.config.features == "frozen"
    return hidden_states(_base() if frozen else learner.policy, torch.tensor([ids]), None)[0, -1]


def value(learner, heads, level, ids):
    return heads[LEVELS[level]](features(learner, ids)).item()


def answer_logp(learner, prompt, answer):
    """log pi(answer | prompt), summed, from Hugging Face's logits; with a gradient."""
    logp = learner.policy(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer))


def reference(learner, row):
    """Row -> the columns of Decisions, one sequence at a time: no padding, no batch, no shared forward."""
    c, online, target = learner.config, learner.critics.online, learner.critics.target
    next_level = row.level if row.next_level is None else row.next_level
    v = value(learner, online.v, row.level, row.prompt)
    q = value(learner, online.q, row.level, row.prompt + row.answer)
    target_q = value(learner, target.q, row.level, row.prompt + row.answer)
    u = row.policy_answer if c.value_answers == "policy" else row.answer
    v_target = value(learner, target.q, row.level, row.prompt + (u if c.value_reads == "answer" else []))
    following = 0.0
    if not row.terminated and c.bootstrap == "v":
        following = value(learner, target.v, next_level, row.next_prompt)
    elif not row.terminated and row.next_answer:
        following = value(learner, target.q, next_level, row.next_prompt + row.next_answer)
    returned = c.advantage == "return" and math.isfinite(row.mc_return)
    advantage = (row.mc_return if returned else q) - v
    mean = c.token_norm == "mean"  # of the data's answer; that of the policy's own is always the sum
    weight = {
        "awr": min(math.exp(advantage / c.temperature), c.max_weight),
        "q_weighted": target_q,
        "signed_advantage": advantage,
    }.get(c.actor, 1.0)
    if c.rl_levels == "planner" and row.level != PLANNER:
        weight = float(row.expert)
    columns = {
        "level": row.level,
        "v": v,
        "q": q,
        "v_target": v_target,
        "td_target": row.reward + c.gamma ** (row.steps if c.discount == "smdp" else 1) * following,
        "advantage": advantage,
        "weight": weight,
        "logp": answer_logp(learner, row.prompt, row.answer).item() / (len(row.answer) if mean else 1),
        "policy_q": 0.0,
        "policy_logp": 0.0,
        "tokens": len(row.answer),
        "expert": row.expert,
        "behavior_logp": row.behavior_logp,
        "mc_return": row.mc_return,
    }
    if c.samples_answers:
        columns["policy_q"] = value(learner, online.q, row.level, row.prompt + row.policy_answer)
        columns["policy_logp"] = answer_logp(learner, row.prompt, row.policy_answer).item()
    return columns


def assert_is_reference(learner, rows, *paddings):
    expected = [reference(learner, row) for row in rows]
    for padding in ({}, *paddings):
        for name, column in learner.decide(make_batch(rows, **padding))._asdict().items():
            by_hand = torch.tensor([e[name] for e in expected], dtype=column.dtype)
            tolerance = {"atol": 2e-5, "rtol": 1e-4, "equal_nan": True}
            torch.testing.assert_close(
                column.detach(), by_hand, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def gradients(learner, rows, *terms):
    """Gradient of the policy from the named losses, or from all of them."""
    decisions = learner.decide(make_batch(rows))
    found = losses(decisions, learner.config, len(rows))
    return torch.autograd.grad(sum(found[t] for t in terms or found), learner.actor_parameters)


# --- every reading: reference, padding, micro-batches, order ----------------------------------------------
@every_reading
def test_a_padded_batch_is_its_rows_one_by_one(reading):
    assert_is_reference(learner_of(**reading), ragged_decisions(), {"extra": 3, "fill": 17})


tokens = st.lists(st.integers(3, V - 1), min_size=1, max_size=6)
answers = tokens.map(lambda ids: [*ids, EOS])
rows = st.builds(
    Row,
    prompt=tokens,
    answer=answers,
    next_prompt=tokens,
    level=st.integers(0, 2),
    reward=st.sampled_from([-1.0, 0.0, 0.5]),
    steps=st.integers(1, 9),
    terminated=st.booleans(),
    next_answer=st.one_of(st.just([]), answers),
    next_level=st.integers(0, 2),
    expert=st.booleans(),
    policy_answer=answers,
    mc_return=st.sampled_from([-1.0, 0.25, math.nan]),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.lists(rows, min_size=1, max_size=5), reading=st.sampled_from(list(READINGS.values())))
def test_any_ragged_batch_is_its_rows_one_by_one(rows, reading):
    assert_is_reference(learner_of(**reading), rows)


@every_reading
def test_micro_batches_are_one_batch_whatever_heads_each_touches(reading):
    decisions = ragged_decisions(levels=(0, 0, 0, 1, 1, 2, 2, 2))  # the first part: planner alone
    whole, split = learner_of(**reading), learner_of(**reading)
    metrics = whole.update([make_batch(decisions)])
    metrics_of_parts = split.update([make_batch(decisions[i : i + 3]) for i in range(0, 8, 3)])  # 3 + 3 + 2
    assert metrics == pytest.approx(metrics_of_parts, rel=1e-4, abs=1e-5)
    for parameters_of in ("actor_parameters", "critic_parameters"):
        for a, b in zip(getattr(whole, parameters_of), getattr(split, parameters_of), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=1e-4)


@every_reading
def test_order_changes_nothing_and_the_batch_is_left_as_it_was(reading):
    decisions = ragged_decisions()
    batch, backwards = make_batch(decisions), make_batch(decisions[::-1])
    before = copy.deepcopy(batch)
    one, other = learner_of(**reading), learner_of(**reading)
    assert one.update([batch]) == pytest.approx(other.update([backwards]), rel=1e-4, abs=1e-5)
    for p, r in zip(one.actor_parameters, other.actor_parameters, strict=True):
        torch.testing.assert_close(p.grad, r.grad, atol=2e-6, rtol=1e-4)
    assert_same(vars(batch), vars(before), atol=0, rtol=0, equal_nan=True)


# --- every knob changes what it should and nothing else ---------------------------------------------------
BC = {"actor": "bc"}
SAMPLED = {"policy_q", "policy_logp"}  # asked for now, 0 before
# field: (its other value, the config around it, the columns, gradients or else parameters that change)
KNOBS = {
    "gamma": (0.5, {}, {"td_target", "q gradient"}),
    "discount": ("smdp", {}, {"td_target", "q gradient"}),
    "expectile": (0.9, {}, {"v gradient"}),
    "expectile_side": ("lower", {}, {"v gradient"}),
    "value_answers": ("policy", {}, {"v_target", "v gradient"} | SAMPLED),
    "value_reads": ("prompt", {}, {"v_target", "v gradient"}),
    "bootstrap": ("next_q", {}, {"td_target", "q gradient"}),
    "conservative": (0.5, {}, {"q gradient"} | SAMPLED),
    "features": ("frozen", BC, {"v", "q", "v_target", "td_target", "advantage", "v gradient", "q gradient"}),
    "polyak": (0.5, {}, {"target"}),
    "actor": ("bc", {}, {"weight", "policy gradient"}),
    "advantage": ("return", {}, {"advantage", "weight", "policy gradient"}),
    "rl_levels": ("planner", {}, {"weight", "policy gradient"}),
    "temperature": (0.1, {}, {"weight", "policy gradient"}),
    "max_weight": (1.0, {}, {"weight", "policy gradient"}),
    "td3_alpha": (1.0, {"actor": "td3_bc"}, {"policy gradient"}),
    "token_norm": ("mean", {}, {"logp", "policy gradient"}),
    "actor_lr": (1e-3, {}, {"policy"}),
    "critic_lr": (1e-3, {}, {"q", "v", "target"}),
    "clip_norm": (1e-3, {}, {"policy gradient", "q gradient", "v gradient"}),
}


def observe(**config):
    """Columns before one step, the gradients it uses, and the parameters after it."""
    learner, batch = learner_of(**config), make_batch(ragged_decisions())
    columns = {name: column.detach().nan_to_num() for name, column in learner.decide(batch)._asdict().items()}
    learner.update([batch])
    online = learner.critics.online
    groups = {"policy": learner.actor_parameters, "q": online.q.parameters(), "v": online.v.parameters()}
    groups = {name: list(group) for name, group in groups.items()}
    gradient = {f"{n} gradient": torch.cat([p.grad.flatten() for p in g]) for n, g in groups.items()}
    groups["target"] = learner.critics.target.parameters()
    after = {n: torch.cat([p.detach().flatten() for p in g]) for n, g in groups.items()}
    return columns | gradient, after


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RLConfig)])
def test_every_knob_changes_what_it_should_and_nothing_else(name):
    other, around, expected = KNOBS[name]
    (before, was), (after, now) = observe(**around), observe(**around | {name: other})
    moved = changed(before, after) or changed(was, now)
    assert moved == expected
    assert changed(was, now)  # one step leads elsewhere


# --- which answer V learns from ---------------------------------------------------------------------------
def one_row(**fields):
    row = Row([5, 6, 7], [10, 11, EOS], [20, 21], EXECUTOR, 0.5, 3, False, [30, EOS])
    return row._replace(policy_answer=[12, 13, 14, EOS], **fields)


def v_targets(rows, **config):
    return learner_of(**config).decide(make_batch(rows)).v_target.tolist()


def test_policy_answers_alone_decide_what_v_regresses_to():
    learner = learner_of(value_answers="policy")
    row = one_row()
    other_data, other_policy = row._replace(answer=[40, EOS]), row._replace(policy_answer=[41, EOS])
    a, b, c = learner.decide(make_batch([row, other_data, other_policy])).v_target.tolist()
    assert a == pytest.approx(b, abs=1e-5) and abs(a - c) > 1e-3
    by_hand = value(learner, learner.critics.target.q, EXECUTOR, [5, 6, 7, 12, 13, 14, EOS])
    assert a == pytest.approx(by_hand, abs=1e-5)
    a, b, c = v_targets([row, other_data, other_policy], value_answers="dataset")
    assert abs(a - b) > 1e-3 and a == pytest.approx(c, abs=1e-5)


def test_value_read_at_the_prompt_does_not_depend_on_the_answer():
    row = one_row()
    change = row._replace(answer=[40, EOS])
    a, b = v_targets([row, change], value_reads="prompt")
    assert a == pytest.approx(b, abs=1e-5)
    a, b = v_targets([row, change], value_reads="answer")
    assert abs(a - b) > 1e-3
    (a,) = v_targets([row], value_reads="prompt")
    (b,) = v_targets([row._replace(prompt=[5, 6, 8])], value_reads="prompt")
    assert abs(a - b) > 1e-3


# --- which side of Q --------------------------------------------------------------------------------------
def columns(B, **given):
    """Decisions of which only `given` is told; the rest is 0."""
    return Decisions(**{name: torch.zeros(B) for name in Decisions._fields} | given)


def v_of_two_points(**config):
    """V that minimises L_V when Q is 1 a quarter of the time, else 0."""
    q, v = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros((), requires_grad=True)
    for _ in range(400):
        loss = losses(columns(4, v_target=q, v=v.expand(4)), RLConfig(**config), count=4)["v_loss"]
        v = (v - torch.autograd.grad(loss, v)[0]).detach().requires_grad_()
    return v.item()


@pytest.mark.parametrize("expectile", [0.7, 0.95])
def test_upper_expectile_is_above_the_mean_and_lower_below(expectile):
    def exact(e):  # e * 1/4 * (1 - v) = (1 - e) * 3/4 * v
        return e / (e + 3 * (1 - e))

    upper = v_of_two_points(expectile=expectile, expectile_side="upper")
    lower = v_of_two_points(expectile=expectile, expectile_side="lower")
    assert upper == pytest.approx(exact(expectile), abs=1e-3) and upper > 0.25
    assert lower == pytest.approx(exact(1 - expectile), abs=1e-3) and lower < 0.25


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7])
def test_lower_is_upper_of_one_minus_the_expectile(expectile):
    given = columns(2, v_target=torch.tensor([3.0, -1.0]))

    def v_loss(e, side):
        return losses(given, RLConfig(expectile=e, expectile_side=side), count=2)["v_loss"].item()

    assert v_loss(expectile, "lower") == pytest.approx(v_loss(1 - expectile, "upper"))
    assert (v_loss(expectile, "lower") == pytest.approx(v_loss(expectile, "upper"))) == (expectile == 0.5)


# --- what follows -----------------------------------------------------------------------------------------
def test_bootstrap_by_hand_from_v_or_from_the_next_answer():
    def target(row, **config):
        learner = learner_of(gamma=0.9, **config)
        return learner.decide(make_batch([row])).td_target.item(), learner.critics.target, learner

    row = one_row()
    y, heads, learner = target(row, bootstrap="v")
    assert y == pytest.approx(0.5 + 0.9 * value(learner, heads.v, EXECUTOR, [20, 21]), abs=1e-5)
    y, heads, learner = target(row, bootstrap="next_q")
    assert y == pytest.approx(0.5 + 0.9 * value(learner, heads.q, EXECUTOR, [20, 21, 30, EOS]), abs=1e-5)
    assert target(row._replace(next_answer=[]), bootstrap="next_q")[0] == 0.5  # nothing follows
    assert target(row._replace(next_answer=[]), bootstrap="v")[0] != 0.5
    for bootstrap in ("v", "next_q"):
        assert target(row._replace(terminated=True), bootstrap=bootstrap)[0] == 0.5


@pytest.mark.parametrize("bootstrap", ["v", "next_q"])
def test_next_level_decides_whose_head_the_bootstrap_reads(bootstrap):
    own = one_row(level=PROGRESS)
    batch = make_batch([own, own._replace(next_level=PLANNER)])
    learner = learner_of(gamma=0.9, bootstrap=bootstrap)
    heads = getattr(learner.critics.target, "v" if bootstrap == "v" else "q")
    before = learner.decide(batch).td_target
    shift(heads, PLANNER, by=1.0)
    torch.testing.assert_close(learner.decide(batch).td_target - before, torch.tensor([0.0, 0.9]))
    shift(heads, PROGRESS, by=1.0)
    torch.testing.assert_close(learner.decide(batch).td_target - before, torch.tensor([0.9, 0.9]))


def test_one_step_subtasks_have_one_discount():
    batch = make_batch([row._replace(steps=1) for row in ragged_decisions()])
    subtask, smdp = learner_of(discount="subtask"), learner_of(discount="smdp")
    assert subtask.update([batch]) == smdp.update([batch])
    assert not changed(parameters(subtask), parameters(smdp))


# --- conservative -----------------------------------------------------------------------------------------
def test_conservative_term_by_hand():
    policy_q, q = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([2.0, 4.0], requires_grad=True)
    given = columns(2, policy_q=policy_q, q=q)
    term = losses(given, RLConfig(conservative=0.5), count=2)["cql_loss"]
    assert term.item() == 0.5 * (1 - 3) / 2
    down, up = torch.autograd.grad(term, (policy_q, q))
    assert down.tolist() == [0.25, 0.25] and up.tolist() == [-0.25, -0.25]
    assert losses(given, RLConfig(conservative=0.5), count=8)["cql_loss"].item() == 0.5 * (1 - 3) / 8
    assert set(losses(given, RLConfig(), count=2)) == {"v_loss", "q_loss", "actor_loss"}
    learner = learner_of(conservative=0.5)
    metrics = learner.update([make_batch(ragged_decisions())])
    assert {"planner/cql_loss", "executor/cql_loss", "progress/cql_loss"} <= set(metrics)


def test_conservative_learning_lowers_q_of_answers_outside_the_data():
    rows = ragged_decisions()
    batch, gap = make_batch(rows), {}
    for alpha in (0.0, 1.0):
        learner = learner_of(conservative=alpha, critic_lr=1e-3)
        for _ in range(20):
            learner.update([batch], train_actor=False)
        online = learner.critics.online.q
        gap[alpha] = sum(
            value(learner, online, r.level, r.prompt + r.policy_answer)
            - value(learner, online, r.level, r.prompt + r.answer)
            for r in rows
        ) / len(rows)
    assert gap[1.0] < gap[0.0] - 0.1


# --- features ---------------------------------------------------------------------------------------------
def test_frozen_features_do_not_follow_the_adapter_and_log_probs_do():
    learner, batch = learner_of(features="frozen", conservative=0.5), make_batch(ragged_decisions())
    before = learner.decide(batch)
    with torch.no_grad():
        for p in learner.actor_parameters:
            p.add_(0.1)
    after = learner.decide(batch)
    for name in ("v", "q", "v_target", "td_target", "advantage", "policy_q"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert (before.logp != after.logp).all() and (before.policy_logp != after.policy_logp).all()


def test_frozen_features_are_those_of_the_backbone_before_lora_and_leave_the_adapter_on():
    learner, row = learner_of(features="frozen"), one_row()
    d = learner.decide(make_batch([row]))
    prompt = _base().model(input_ids=torch.tensor([row.prompt])).last_hidden_state[:, -1]
    torch.testing.assert_close(d.v, learner.critics.v(prompt, torch.tensor([EXECUTOR])))
    adapted = answer_logp(learner, row.prompt, row.answer)  # after the step's own forwards
    torch.testing.assert_close(d.logp[0], adapted)
    bare = make_learner(copy.deepcopy(_base()))
    assert abs(answer_logp(bare, row.prompt, row.answer) - adapted) > 1e-3
    assert all(p.requires_grad for p in learner.actor_parameters)


def test_frozen_features_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match="--rank above 0"):
        make_learner(make_policy(lora=False), features="frozen")


# --- actors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        ("awr", [math.exp(2), 3.0 * 1e3, math.exp(-2)]),
        ("q_weighted", [-7.0, 8.0, 9.0]),
        ("signed_advantage", [1.0, 100.0, -1.0]),
        ("bc", [1.0, 1.0, 1.0]),
        ("td3_bc", [1.0, 1.0, 1.0]),
    ],
)
def test_weight_of_each_actor_by_hand(actor, expected):
    advantage, target_q = torch.tensor([1.0, 100.0, -1.0]), torch.tensor([-7.0, 8.0, 9.0])
    level, expert = torch.arange(3), torch.tensor([False, True, False])
    config = RLConfig(actor=actor, temperature=0.5, max_weight=3e3)
    weight = actor_weight(advantage.requires_grad_(), target_q, level, expert, config)
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-4, atol=0)
    assert not weight.requires_grad  # held constant
    if actor != "td3_bc":  # that pair is refused
        config = dataclasses.replace(config, rl_levels="planner")  # below it, experts alone
        weight = actor_weight(advantage, target_q, level, expert, config)
        torch.testing.assert_close(weight, torch.tensor([expected[0], 1.0, 0.0]), rtol=1e-4, atol=0)


def test_the_table_of_actors_is_complete():
    named = {reading.get("actor", "awr") for reading in READINGS.values()}
    assert named == set(get_args(Actor))


@pytest.mark.parametrize("answers", ["dataset", "policy"])
def test_q_weighted_reads_the_target_q_of_the_data_answer(answers):
    learner = learner_of(actor="q_weighted", value_answers=answers)
    row, critics = one_row(), learner.critics
    before = learner.decide(make_batch([row])).weight.item()
    by_hand = value(learner, critics.target.q, EXECUTOR, row.prompt + row.answer)
    assert before == pytest.approx(by_hand, abs=1e-5)
    for heads, by in ((critics.online.q, 0.0), (critics.target.v, 0.0), (critics.target.q, 1.0)):
        weight = learner.decide(make_batch([row])).weight.item()
        shift(heads, EXECUTOR, by=1.0)
        assert learner.decide(make_batch([row])).weight.item() - weight == pytest.approx(by, abs=1e-5)


@pytest.mark.parametrize(("v_shift", "direction"), [(10.0, -1), (-10.0, 1)])
def test_signed_advantage_pushes_a_poor_answer_down_and_awr_never_does(v_shift, direction):
    batch = make_batch([one_row()])
    for actor, expected in (("signed_advantage", direction), ("awr", 1)):
        learner = learner_of(actor=actor, temperature=5.0)
        shift(learner.critics.online.v, EXECUTOR, by=v_shift)
        before = learner.decide(batch)
        assert math.copysign(1, before.advantage.item()) == direction
        learner.update([batch])
        assert (learner.decide(batch).logp - before.logp).item() * expected > 1e-5


# --- td3_bc -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_policy_gradient_of_a_categorical_is_the_exact_gradient_of_expected_q(baseline):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logp = logits.log_softmax(0)
    pi = logp.exp().detach()
    sampled = sum(pi[u] * policy_gradient_loss(logp[u, None], q[u, None] - baseline) for u in range(4))
    (found,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logp.exp() * q).sum(), logits)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(exact, -pi * (q - (pi * q).sum()))  # by hand


def test_policy_gradient_of_the_language_model_is_exact_in_expectation():
    """All one-token answers u of one prompt, each as often as the policy says: V cancels as a baseline."""
    learner, prompt = learner_of(actor="td3_bc", td3_alpha=2.5), [5, 6, 7]
    d = learner.decide(make_batch([one_row()._replace(policy_answer=[u]) for u in range(V)]))
    pi = learner.policy(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    expectation = sum(
        pi[u].detach() * losses(Decisions(*(c[u : u + 1] for c in d)), learner.config, 1, 0.5)["pg_loss"]
        for u in range(V)
    )
    found = torch.autograd.grad(expectation, learner.actor_parameters, retain_graph=True)
    q = torch.tensor([value(learner, learner.critics.online.q, EXECUTOR, [*prompt, u]) for u in range(V)])
    exact = torch.autograd.grad(-2.5 / 0.5 * (pi * q).sum(), learner.actor_parameters)
    assert max(g.abs().max() for g in exact) > 1e-2
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-3)


def test_td3_bc_is_cloning_plus_alpha_over_mean_q_times_the_policy_gradient():
    rows = ragged_decisions()
    learner = learner_of(actor="td3_bc", td3_alpha=3.0)
    d = learner.decide(make_batch(rows))
    advantage = (d.policy_q - d.v).detach()
    loss = -d.logp.mean() - 3.0 / d.policy_q.abs().mean().item() * (advantage * d.policy_logp).mean()
    by_hand = torch.autograd.grad(loss, learner.actor_parameters)
    metrics = learner.update([make_batch(rows)])
    found = tuple(p.grad for p in learner.actor_parameters)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-4)
    assert "executor/pg_loss" in metrics


def test_td3_bc_without_the_policy_gradient_is_cloning():
    cloning = gradients(learner_of(actor="bc"), ragged_decisions())
    torch.testing.assert_close(
        gradients(learner_of(actor="td3_bc", td3_alpha=0.0), ragged_decisions()), cloning
    )


def test_readings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="value_reads='prompt'"):
        RLConfig(value_reads="prompt", value_answers="policy")
    with pytest.raises(ValueError, match="rl_levels='all'"):
        RLConfig(rl_levels="planner", actor="td3_bc")


# --- limits of the actors ---------------------------------------------------------------------------------
def test_infinite_temperature_is_cloning_and_rl_levels_then_forgets_the_rollouts():
    rows = ragged_decisions(levels=(EXECUTOR, PROGRESS))
    cloning = gradients(learner_of(actor="bc"), rows)
    torch.testing.assert_close(gradients(learner_of(temperature=math.inf), rows), cloning)
    experts = [row for row in rows if row.expert]
    share = len(experts) / len(rows)
    of_experts = [share * g for g in gradients(learner_of(actor="bc"), experts)]
    for actor in ("awr", "q_weighted", "signed_advantage"):
        found = gradients(learner_of(actor=actor, rl_levels="planner"), rows)
        torch.testing.assert_close(list(found), of_experts, atol=1e-5, rtol=1e-4)


# --- presets ----------------------------------------------------------------------------------------------
def test_presets_name_fields_that_exist_and_releases_differ_from_papers():
    built = {n: (RLConfig(**p["rl"]), Credit(**p["credit"])) for n, p in PRESETS.items()}
    for method in ("glider", "step_hrl"):
        published, released = built[f"as_published_{method}"], built[f"as_released_{method}"]
        assert published[0] != released[0] and published[1] != released[1]
        assert set(PRESETS[f"as_released_{method}"]) == {"rl", "credit"}


def test_as_released_glider_by_hand():
    """SARSA with the target Q; planner: -mean(Q_target * mean token log pi); below: cloning of experts."""
    learner = learner_of(**PRESETS["as_released_glider"]["rl"])
    planner, last = one_row(level=PLANNER), one_row(level=PLANNER, reward=1.0, next_answer=[])
    expert, rollout = one_row(level=EXECUTOR), one_row(level=EXECUTOR, expert=False)
    found = losses(d := learner.decide(make_batch([planner, last, expert, rollout])), learner.config, 4)
    q = value(learner, learner.critics.target.q, PLANNER, planner.prompt + planner.answer)
    q_next = value(learner, learner.critics.target.q, PLANNER, [20, 21, 30, EOS])
    logp = answer_logp(learner, planner.prompt, planner.answer).item() / 3
    assert d.td_target[:2].tolist() == pytest.approx([0.5 + 0.99 * q_next, 1.0], abs=1e-5)
    assert found["actor_loss"].item() == pytest.approx(-(2 * q * logp + logp + 0 * logp) / 4, abs=1e-4)


def test_as_released_step_hrl_by_hand():
    """V: 0.05 where Q_target(prompt) > V, 0.95 below; Q: r + gamma V_target(s'); -mean(A * mean log pi)."""
    learner = learner_of(**PRESETS["as_released_step_hrl"]["rl"])
    row, critics = one_row(), learner.critics
    v_read = value(learner, critics.target.q, EXECUTOR, row.prompt)
    for v_shift, weight in ((-50.0, 0.05), (100.0, 0.95)):
        shift(critics.online.v, EXECUTOR, by=v_shift)
        found = losses(d := learner.decide(make_batch([row])), learner.config, 1)
        v = value(learner, critics.online.v, EXECUTOR, row.prompt)
        q = value(learner, critics.online.q, EXECUTOR, row.prompt + row.answer)
        logp = answer_logp(learner, row.prompt, row.answer).item() / 3
        assert found["v_loss"].item() == pytest.approx(weight * (v_read - v) ** 2, rel=1e-4)
        assert found["actor_loss"].item() == pytest.approx(-(q - v) * logp, rel=1e-4)
        following = value(learner, critics.target.v, EXECUTOR, row.next_prompt)
        assert d.td_target.item() == pytest.approx(0.5 + 0.99 * following, abs=1e-5)
