"""hiper.py and train_hiper.py: advantages by method, losses by hand and at their limits, runs and resume."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_hae import GOLDEN, REWARD, V_HIGH, V_LOW, V_TERM
from test_hae import SWITCH as SWITCHED
from test_model import load, make_backbone

import collect
import eval as evaluation
import train_hiper
import train_orl
import train_sft
from critic import Values, gae
from diagnostics import alarms
from hiper import (
    HiperConfig,
    Trace,
    advantages,
    behaviour,
    clipped_loss,
    estimate,
    fit,
    group_advantage,
    improve,
    k3,
    rewards,
    traces,
    whiten,
)
from logprob import head_weight, sequence_logprobs
from model import hidden_states, load_policy
from plan_execute import ACTION, SWITCH, Decided, PlanExecute, TurnRequest, collate

T = torch.tensor
NO_KEEP = torch.zeros(7)


def trace(terminated=True, final=(0.0, 0.0), reward=REWARD, **changes) -> Trace:
    """The golden vector's episode; `final`: V_high and V_low of the observation after it."""
    after = [torch.cat([v, T([x])]) for v, x in ((V_HIGH, final[0]), (V_LOW, final[1]), (V_TERM, 0.0))]
    return Trace(
        reward, SWITCHED[: len(reward)], torch.full((6,), 0.3), terminated, *after, NO_KEEP
    )._replace(**changes)


# --- advantages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma, lam, low, high, term", GOLDEN)
def test_hipers_three_advantages_are_the_golden_vectors(gamma, lam, low, high, term):
    found, targets = estimate(trace(), HiperConfig(gamma=gamma, lam=lam, lam_segment=0.95))
    assert found[:, 2].tolist() == pytest.approx(low, abs=2e-6)
    assert found[SWITCHED, 1].tolist() == pytest.approx(high, abs=2e-6) and found[~SWITCHED, 1].isnan().all()
    assert found[:, 0].tolist() == pytest.approx(term, abs=2e-6)
    assert (targets["low"] - V_LOW).tolist() == pytest.approx(low, abs=2e-6)
    assert (targets["high"] - V_HIGH)[SWITCHED].tolist() == pytest.approx(high, abs=2e-6)
    assert targets["high"][~SWITCHED].isnan().all()
    assert (targets["term"] - V_TERM).tolist() == pytest.approx(term, abs=2e-6)


def test_the_papers_switch_term_replaces_the_third_head():
    keep = torch.cat([V_LOW - 0.2, T([9.0])])
    config = HiperConfig(switch_term="paper")
    found, _ = estimate(trace(v_keep=keep), config)
    expected = (SWITCHED.float() - 0.3) * (V_HIGH - (V_LOW - 0.2))
    assert torch.allclose(found[:, 0], expected)
    released, _ = estimate(trace(v_keep=keep), replace(config, switch_term="released"))
    assert torch.equal(found[:, 2], released[:, 2])


def test_flat_gae_is_plain_gae_of_the_value_after_the_prompt_for_every_part():
    config = HiperConfig(advantage="gae", gamma=0.9, lam=0.8)
    found, targets = estimate(trace(terminated=False, final=(0.4, 9.0)), config)
    after = torch.cat([V_HIGH[1:], T([0.4])])
    plain = gae(REWARD, V_HIGH, after, torch.full((6,), 0.72), torch.full((6,), 0.9))
    assert torch.allclose(found, plain[:, None].expand(-1, 3))
    assert torch.allclose(targets["high"], plain + V_HIGH) and set(targets) == {"high"}


@pytest.mark.parametrize("method", ["hiper", "gae"])
def test_a_time_limit_bootstraps_from_the_next_observation_and_an_end_does_not(method):
    config = HiperConfig(advantage=method, gamma=0.9)
    ended, _ = estimate(trace(terminated=True, final=(5.0, 7.0)), config)
    zero, _ = estimate(trace(terminated=False, final=(0.0, 0.0)), config)
    cut, _ = estimate(trace(terminated=False, final=(0.5, 0.6)), config)
    assert torch.equal(ended.nan_to_num(), zero.nan_to_num()), "what stands in for an ended world is not read"
    as_end, _ = estimate(trace(terminated=False, final=(0.5, 0.6)), replace(config, limit="end"))
    assert torch.equal(as_end.nan_to_num(), ended.nan_to_num())
    gain = (cut - ended)[5]
    assert gain[2].item() == pytest.approx(0.9 * (0.6 if method == "hiper" else 0.5))
    assert gain[1].item() == pytest.approx(0.9 * 0.5)


def test_group_advantage_by_hand_and_of_equal_returns():
    assert group_advantage(T([1.0, 0.0, 1.0, 0.0])).tolist() == pytest.approx([1, -1, 1, -1], abs=1e-4)
    assert group_advantage(T([1.0, 1.0])).tolist() == [0, 0]


def test_whiten_leaves_out_what_is_not_known():
    found = whiten(T([1.0, math.nan, 3.0, math.nan]))
    assert found.tolist() == pytest.approx([-1, 0, 1, 0], abs=1e-5)


def player(game: str, lengths: int) -> SimpleNamespace:
    return SimpleNamespace(episode=SimpleNamespace(task="t", variation=game), turns=[None] * lengths)


def test_the_groups_advantage_is_each_plays_return_among_plays_of_its_game():
    plays = [("a", [0.0, 1.0]), ("b", [0.0]), ("a", [0.0, 0.0, 0.0]), ("b", [1.0])]
    found = [trace(reward=T(r)) for _, r in plays]
    result, targets = advantages([player(g, len(r)) for g, r in plays], found, HiperConfig(advantage="group"))
    assert result[:, 0].tolist() == pytest.approx([1, 1, -1, -1, -1, -1, 1], abs=1e-4)
    assert targets == {} and (result == result[:, :1]).all()


def test_advantages_are_whitened_over_the_whole_iteration_and_each_column_by_itself():
    found, targets = advantages([player("a", 6), player("b", 6)], [trace(), trace()], HiperConfig())
    assert found.shape == (12, 3) and all(len(t) == 12 for t in targets.values())
    assert found[:, 2].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[:, 2].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    switched = torch.cat([SWITCHED, SWITCHED])
    assert found[switched, 1].mean().item() == pytest.approx(0, abs=1e-6)
    assert (found[~switched, 1] == 0).all()


# --- losses -------------------------------------------------------------------------------------------------
def test_the_clipped_loss_by_hand():
    """ratio 1.5: A > 0 counts 1.2 A; A < 0 counts 1.5 A. Ratio 0.5: A > 0 counts 0.5 A; A < 0 counts 0.8 A.
    Ratio 10, A < 0: at most 3 |A|."""
    logp = T([1.5, 1.5, 0.5, 0.5, 10.0]).log()
    advantage = T([1.0, -1.0, 1.0, -1.0, -1.0])
    loss = clipped_loss(logp, torch.zeros(5), advantage, 0.2, 1)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 - 3.0), abs=1e-5)
    assert clipped_loss(logp, torch.zeros(5), advantage, 0.2, 10).item() == pytest.approx(0.36, abs=1e-5)


def test_where_nothing_has_moved_the_gradient_is_that_of_advantage_times_log_pi():
    logp, advantage = T([-1.0, -2.0, -0.5], requires_grad=True), T([0.5, -1.0, 2.0])
    (gradient,) = torch.autograd.grad(clipped_loss(logp, logp.detach(), advantage, 0.2, 3), logp)
    assert torch.allclose(gradient, -advantage / 3)


def test_beyond_the_clip_there_is_no_gradient():
    logp = T([1.5, 0.5]).log().requires_grad_()
    loss = clipped_loss(logp, torch.zeros(2), T([1.0, -1.0]), 0.2, 1)
    assert torch.autograd.grad(loss, logp)[0].tolist() == [0, 0]


def test_k3_is_0_where_equal_never_negative_and_has_the_mean_of_the_kl():
    assert k3(T([-1.0]), T([-1.0])).item() == 0
    p, q = T([0.5, 0.3, 0.2]), T([0.2, 0.5, 0.3])
    estimates = k3(p.log(), q.log())
    assert (estimates > 0).all()
    assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert k3(T([-30.0]), T([0.0])).item() == 10


# --- the update ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("hiper") / "m")


def turns_of(policy, tokenizer, count=6) -> tuple[list[Decided], PlanExecute]:
    player = PlanExecute(policy, tokenizer, temperature=HiperConfig().temperature)
    asked = [
        TurnRequest("executor", f"Act.\nTask: {'go ' * i}\nSwitch:", 9, i, "find x" * (i > 1))
        for i in range(count)
    ]
    return player.answer(asked), player


def one_step(tiny, advantage, max_tokens=4096, **changes):
    policy, tokenizer = load(tiny)
    turns, player = turns_of(policy, tokenizer)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    config = replace(HiperConfig(batch_size=6, clip_norm=1e9), **changes)
    reference, _ = load(tiny)
    metrics = improve(
        policy, reference, lambda m, ids: hidden_states(m, ids), optimizer, turns, advantage, player.encode,
        max_tokens, config, torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {n: p.detach() - before[n] for n, p in policy.named_parameters() if p.requires_grad}, metrics


def test_micro_batches_change_nothing_since_advantages_come_before_padding(tiny):
    advantage = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    whole, one = one_step(tiny, advantage)
    parts, other = one_step(tiny, advantage, max_tokens=60)
    assert max(x.abs().max() for x in whole.values()) > 1e-3
    for name, moved in whole.items():
        torch.testing.assert_close(parts[name], moved, atol=1e-5, rtol=1e-3)
    assert one["policy/loss"] == pytest.approx(other["policy/loss"], abs=1e-5)
    assert one["policy/kl"] == pytest.approx(0, abs=1e-6) and one["policy/clipped"] == 0


def test_a_part_without_advantage_moves_nothing(tiny):
    """Only inserted tokens and parts of advantage 0 are left: the policy stays, but for k3 at 0."""
    moved, _ = one_step(tiny, torch.zeros(6, 3))
    assert max(x.abs().max() for x in moved.values()) < 1e-6


def test_the_step_makes_what_was_better_likelier_and_what_was_worse_less_likely(tiny):
    policy, tokenizer = load(tiny)
    turns, player = turns_of(policy, tokenizer)
    advantage = torch.zeros(6, 3)
    advantage[2:4, 2], advantage[4:, 2] = 1.0, -1.0
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    reference, _ = load(tiny)
    improve(
        policy, reference, lambda m, ids: hidden_states(m, ids), optimizer, turns, advantage, player.encode,
        4096, HiperConfig(batch_size=6), torch.Generator(),
    )  # fmt: skip
    batch = collate(turns, player.encode)
    mask, (weight, bias) = batch.part == ACTION, head_weight(policy.get_output_embeddings(), policy.config)
    with torch.no_grad():
        hidden = hidden_states(policy, batch.input_ids)
        logp, _ = sequence_logprobs(hidden / 0.7, weight, batch.input_ids, mask, bias=bias)
    change = (logp - torch.where(mask, batch.logprobs, 0.0)).sum(1)
    assert change[2:4].sum() > 0 > change[4:].sum()


def test_the_values_learn_their_targets_and_skip_what_has_none():
    torch.manual_seed(0)
    values, hidden = Values(8), torch.randn(40, 2, 8)
    turns = [SimpleNamespace(hidden=h) for h in hidden]
    targets = {"high": torch.full((40,), math.nan), "low": hidden[:, 1, 0].clone()}
    targets["high"][::2] = 2.0
    optimizer, config = torch.optim.Adam(values.parameters(), lr=3e-3), HiperConfig(value_epochs=200)
    first = fit(values, optimizer, turns, targets, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = values(hidden)
    assert first["low/explained_variance"] < 0.5
    assert (after["low"] - hidden[:, 1, 0]).abs().mean() < 0.15
    assert (after["high"][::2] - 2).abs().mean() < 0.3
    assert "term/explained_variance" not in first


# --- the script ---------------------------------------------------------------------------------------------
COMMON = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A barely trained plan-execute policy, on generated games."""
    folder = tmp_path_factory.mktemp("train_hiper")
    play = {"env": "alfworld", "panel": "demo", "limit": 3, "workers": 0, **COMMON}
    collect.main(collect.Config(out=folder / "gold.jsonl", **play))
    sft = train_sft.Config(data=folder / "gold.jsonl", out=folder / "sft", plan_execute=True, **COMMON)
    train_sft.main(replace(sft, epochs=12.0))
    return folder


def config(start: Path, name: str, **changes) -> train_hiper.Config:
    config = train_hiper.Config(
        init=start / "sft", out=start / name, panel="demo", dev_limit=1, episodes=12, per_iteration=4,
        group=2, warmup=1, max_steps=5, dev_steps=6, eval_every=8,
        rl=HiperConfig(turns=16, batch_size=8), **COMMON,
    )  # fmt: skip
    return replace(config, **changes)


def metrics(folder: Path) -> dict[str, list[float]]:
    found = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["metric"], []).append(float(row["value"]))
    return found


def adapter(folder: Path) -> dict:
    return {
        n: p.detach() for n, p in load_policy(folder, trainable=True)[0].named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("method", ["hiper", "gae", "group"])
def test_it_plays_its_episodes_warms_up_learns_and_evaluates(start, method):
    rl = replace(config(start, "x").rl, advantage=method, switch_term="paper")
    train_hiper.main(config(start, method, rl=rl))
    rows = metrics(start / method)
    assert rows["play/episodes"] == [4, 8, 12] and rows["dev/episodes"] == [0, 8, 12]
    assert len(rows["policy/loss"]) == (3 if method == "group" else 2)
    assert len(rows.get("high/explained_variance", [])) == (0 if method == "group" else 3)
    assert ("low/value_mean" in rows) == (method == "hiper")
    before, after = adapter(start / "sft"), adapter(start / method)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    (group,) = torch.load(start / method / "state.pt", weights_only=True)["actor"]["param_groups"]
    assert group["lr"] == pytest.approx(rl.lr / 3), "falls to 0; 8 of 12 episodes lay behind the last steps"
    meta = load_policy(start / method)[2]
    assert meta["stage"] == "hiper" and meta["format"] == "plan-execute"


def test_a_stopped_run_goes_on_to_the_same_policy(start, monkeypatch):
    if not (start / "hiper" / "policy.json").exists():
        train_hiper.main(config(start, "hiper", rl=replace(config(start, "x").rl, switch_term="paper")))
    whole, saved = config(start, "stopped", rl=replace(config(start, "x").rl, switch_term="paper")), []

    def stop(self, step, **state):
        save(self, step, **state)
        saved.append(step)
        if len(saved) == 1:
            raise KeyboardInterrupt

    save = train_hiper.Run.save_state
    monkeypatch.setattr(train_hiper.Run, "save_state", stop)
    with pytest.raises(SystemExit, match="go on with --resume"):
        train_hiper.main(whole)
    train_hiper.main(replace(whole, resume=True))
    again, once = adapter(start / "stopped"), adapter(start / "hiper")
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_eval_plays_a_plan_execute_checkpoint(start):
    asked = evaluation.Config(
        checkpoint=start / "sft", env="alfworld", panel="demo", split="valid_seen", limit=1, workers=0,
        max_steps=5, out=start, name="pe", **COMMON,
    )  # fmt: skip
    result = evaluation.main(asked)
    assert result["episodes"] == 6 and result["parse_failure_rate"] < 1
    assert set(result["tokens_per_decision"]) == {"executor"}


@pytest.mark.parametrize(
    "quantity, healthy, collapsed",
    [
        ("switch_rate", 0.2, 0.0),
        ("switch_rate", 0.2, 1.0),
        ("format_rate", 0.99, 0.5),
        ("answer_tokens", 10, 40),
    ],
)
def test_an_alarm_names_the_collapse_and_is_silent_before(quantity, healthy, collapsed):
    assert alarms({f"play/{quantity}": [healthy] * 30}) == {}
    (text,) = alarms({f"play/{quantity}": [healthy] * 15 + [collapsed] * 15}).values()
    assert quantity in text and "--rl." in text


def test_another_format_and_an_uneven_group_are_refused(start, tmp_path):
    sft = train_sft.Config(data=start / "gold.jsonl", out=tmp_path / "roles", epochs=0.0, **COMMON)
    train_sft.main(sft)
    with pytest.raises(ValueError, match="train_sft.py --plan-execute"):
        train_hiper.main(config(start, "no", init=tmp_path / "roles"))
    with pytest.raises(ValueError, match="no multiple of --group 8"):
        train_hiper.main(config(start, "no", group=8, per_iteration=12))


def test_penalties_and_traces_by_hand(start):
    """A turn out of format costs 0.1, an action that is not understood what is asked; beta is pi(switch)."""
    model, tokenizer, _ = load_policy(start / "sft")
    player = PlanExecute(model, tokenizer, temperature=1.0)
    c = config(start, "x", max_steps=4)
    with train_hiper.EnvPool("alfworld", 2, 0, 4) as pool:
        panel = train_hiper.read_panel("alfworld", "demo", "train", 1)[:2]
        players = train_hiper.play(pool, panel, player, c, 0)
    p = players[0]
    p.turns[1].valid = False
    p.episode.turns[2].obs, p.turns[2].valid = "Nothing happens.", True
    config_ = HiperConfig(invalid_penalty=0.5, format_penalty=0.1)
    cost = [t.reward for t in p.episode.turns] - rewards(p, config_).numpy()
    assert cost[1] == pytest.approx(0.1 + 0.5)
    values = Values(model.config.hidden_size)
    found = traces(players, player, values, replace(config_, switch_term="paper"))
    for p, f in zip(players, found, strict=True):
        assert len(f.reward) == len(p.turns) and len(f.v_high) == len(p.turns) + 1
        for t, turn in enumerate(p.turns[1:], start=1):
            said = math.exp(turn.logp_of(SWITCH))
            assert f.probability[t].item() == pytest.approx(said if turn.switched else 1 - said, abs=1e-5)
        kept = [t for t, turn in enumerate(p.turns) if not turn.switched]
        assert torch.equal(f.v_keep[kept], f.v_low[kept])
    assert behaviour(players)["play/turns"] == sum(len(p.turns) for p in players) / 2


def test_a_plan_execute_policy_is_no_start_for_scripts_of_the_three_roles(start):
    episodes = {"expert": start / "gold.jsonl", "rollouts": start / "gold.jsonl"}
    with pytest.raises(ValueError, match="speaks 'plan-execute', expected 'roles'"):
        train_orl.main(train_orl.Config(init=start / "sft", out=start / "orl", **episodes, **COMMON))
    with pytest.raises(ValueError, match="--plan-execute is one policy"):
        train_sft.main(
            train_sft.Config(
                data=start / "gold.jsonl", out=start / "no", plan_execute=True, adapters="separate", **COMMON
            )
        )
