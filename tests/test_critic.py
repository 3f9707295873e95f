"""critic.py: targets and losses by hand, their limits, and heads that keep levels apart."""

import math

import pytest
import torch

from critic import (
    Critics,
    awr_weight,
    bootstrap_discount,
    conservative_loss,
    effective_sample_size,
    expectile_loss,
    load_critics,
    save_critics,
    td_loss,
    td_target,
)

torch.set_num_threads(1)


def tensor(*values):
    return torch.tensor(values)


# --- losses, targets, weights -----------------------------------------------------------------------------
def test_expectile_by_hand():  # u = -1 and 2, so (0.3 * 1 + 0.7 * 4) / 2
    diff = tensor(-1.0, 2.0)
    assert expectile_loss(diff, 0.7).item() == pytest.approx(1.55)
    assert expectile_loss(diff, 0.7, count=10).item() == pytest.approx(0.31)


def test_expectile_one_half_is_half_the_squared_error():
    diff = torch.randn(100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(expectile_loss(diff, 0.5), 0.5 * diff.pow(2).mean())


def minimiser(q, expectile):
    v = torch.zeros((), requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(expectile_loss(q - v, expectile), v)
        v = (v - gradient).detach().requires_grad_()
    return v.item()


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.9])
def test_expectile_of_two_points(expectile):
    # Q is 1 with probability 1/4, else 0: expectile * 1/4 * (1 - v) = (1 - expectile) * 3/4 * v
    expected = expectile * 0.25 / (expectile * 0.25 + (1 - expectile) * 0.75)
    found = minimiser(tensor(0.0, 0.0, 0.0, 1.0), expectile)
    assert found == pytest.approx(expected, abs=1e-4)
    if expectile > 0.5:
        assert found > 0.25  # optimistic: above the mean
    elif expectile < 0.5:
        assert found < 0.25


def test_td_target_termination_and_truncation_by_hand():
    reward = tensor(1.0, 1.0, 0.5)
    terminated = tensor(True, False, False)  # the second was cut off by a step limit: it bootstraps
    target = td_target(reward, tensor(0.9, 0.9, 0.5), terminated, tensor(math.nan, 2.0, -1.0))
    torch.testing.assert_close(target, tensor(1.0, 1.0 + 0.9 * 2.0, 0.5 - 0.5))


def test_td_loss_by_hand_holds_the_target_constant():
    q, target = tensor(1.0, 2.0).requires_grad_(), tensor(3.0, 1.0).requires_grad_()
    loss = td_loss(q, target)
    assert loss.item() == (4 + 1) / 2
    assert td_loss(q, target, count=5).item() == 1.0
    loss.backward()
    assert q.grad.tolist() == [-2.0, 1.0] and target.grad is None


def test_bootstrap_discount_by_hand():
    steps = tensor(1, 2, 5)
    torch.testing.assert_close(bootstrap_discount(0.9, steps, "subtask"), tensor(0.9, 0.9, 0.9))
    torch.testing.assert_close(bootstrap_discount(0.9, steps, "smdp"), tensor(0.9, 0.81, 0.9**5))
    one = torch.ones(3, dtype=torch.long)  # one-step subtasks: the two are the same thing
    assert torch.equal(bootstrap_discount(0.9, one, "subtask"), bootstrap_discount(0.9, one, "smdp"))
    with pytest.raises(ValueError, match="'gamma'"):
        bootstrap_discount(0.9, steps, "gamma")


def test_awr_weight_by_hand():
    weight = awr_weight(tensor(0.0, 1.0, -1.0), temperature=0.5, max_weight=20.0)
    torch.testing.assert_close(weight, tensor(1.0, math.exp(2), math.exp(-2)))


def test_awr_weight_of_huge_advantages_is_the_ceiling():
    advantage = tensor(1e30, 1000.0, 0.0, -1000.0).requires_grad_()
    weight = awr_weight(advantage, temperature=0.01, max_weight=20.0)
    torch.testing.assert_close(weight, tensor(20.0, 20.0, 1.0, 0.0))
    assert not weight.requires_grad  # held constant
    assert awr_weight(tensor(1000.0), 0.01, math.inf).isinf()  # the ceiling is what keeps it finite


def test_awr_weight_infinite_temperature_is_behaviour_cloning():
    assert awr_weight(tensor(-50.0, 0.0, 1e30), math.inf, 20.0).tolist() == [1.0, 1.0, 1.0]


def test_effective_sample_size_by_hand():
    assert effective_sample_size(torch.full((7,), 0.3)).item() == pytest.approx(7.0)
    assert effective_sample_size(tensor(5.0, 0.0, 0.0)).item() == pytest.approx(1.0)
    assert effective_sample_size(tensor(1.0, 3.0)).item() == pytest.approx(16 / 10)


def test_effective_sample_size_of_signed_weights_counts_their_sizes():
    assert effective_sample_size(tensor(1.0, -3.0)).item() == pytest.approx(16 / 10)
    assert effective_sample_size(tensor(2.0, -2.0)).item() == pytest.approx(2.0)  # the sum is 0, the size not
    assert effective_sample_size(tensor(0.0, 0.0)).item() == 0.0


def test_conservative_loss_by_hand_pushes_policy_answers_down_and_data_answers_up():
    policy_q, data_q = tensor(3.0, 1.0).requires_grad_(), tensor(2.0, 4.0).requires_grad_()
    loss = conservative_loss(policy_q, data_q)
    assert loss.item() == ((3 - 2) + (1 - 4)) / 2
    assert conservative_loss(policy_q, data_q, count=4).item() == -0.5
    loss.backward()
    assert policy_q.grad.tolist() == [0.5, 0.5] and data_q.grad.tolist() == [-0.5, -0.5]


def test_chain_converges_to_dynamic_programming():
    """States 0..3, actions left/right taken equally often; 3 -> right ends with reward 1, others cost 0.1.

    With expectile 0.5 V is the value of the behaviour policy: V = (1/2) sum_a [r + gamma (1 - end) V'].
    """
    S, gamma = 4, 0.9
    state = torch.arange(S).repeat_interleave(2)  # (8,) every state-action pair once
    action = torch.arange(2).repeat(S)
    next_state = (state + 2 * action - 1).clamp(0, S - 1)
    terminated = (state == S - 1) & (action == 1)
    reward = torch.where(terminated, 1.0, -0.1)

    transition = torch.zeros(S, S).index_put_(
        (state, next_state), torch.where(terminated, 0.0, 0.5), accumulate=True
    )
    mean_reward = reward.view(S, 2).mean(1)
    exact = torch.linalg.solve(torch.eye(S) - gamma * transition, mean_reward)

    q, v = (
        torch.zeros(S, 2, requires_grad=True),
        torch.zeros(S, requires_grad=True),
    )  # linear in one-hot features
    optimizer = torch.optim.SGD([q, v], lr=0.5)
    discount = bootstrap_discount(gamma, torch.ones(len(state)), "subtask")
    for _ in range(400):
        target = td_target(reward, discount, terminated, v[next_state])
        diff = q[state, action].detach() - v[state]
        loss = td_loss(q[state, action], target, count=1) + expectile_loss(diff, 0.5, count=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(v.detach(), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        q.detach().flatten(), td_target(reward, discount, terminated, exact[next_state]), atol=1e-3, rtol=0
    )
    assert (q[:, 1] > q[:, 0]).all()  # towards the reward


# --- heads ------------------------------------------------------------------------------------------------
def critics_of_size(D=8, seed=0):
    torch.manual_seed(seed)
    return Critics(D)


def mixed_batch(B=9, D=8):
    hidden = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    return hidden, torch.arange(B) % 3


@pytest.mark.parametrize("method", ["q", "v", "target_q", "target_v"])
def test_mixed_levels_equal_calls_per_level(method):
    critics, (hidden, level) = critics_of_size(), mixed_batch()
    values = getattr(critics, method)(hidden, level)
    assert values.shape == (9,) and values.dtype == torch.float32
    for index, name in enumerate(critics.levels):
        heads = getattr(critics.target if "target" in method else critics.online, method[-1])
        torch.testing.assert_close(values[level == index], heads[name](hidden[level == index]).squeeze(-1))
    other = getattr(critics, method)(hidden, (level + 1) % 3)
    assert (values != other).all()  # each level has its own head


def test_q_and_v_heads_are_independent():
    critics, (hidden, level) = critics_of_size(), mixed_batch()
    assert (critics.q(hidden, level) != critics.v(hidden, level)).all()
    critics.q(hidden, level).sum().backward()
    assert all(p.grad is None for p in critics.online.v.parameters())


def test_gradients_reach_only_the_heads_in_the_batch():
    critics, (hidden, _) = critics_of_size(), mixed_batch()
    critics.v(hidden, torch.ones(9, dtype=torch.long)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in critics.online.v["executor"].parameters())
    for name in ("planner", "progress"):
        assert all(p.grad is None for p in critics.online.v[name].parameters())


def test_targets_are_a_frozen_copy():
    critics, (hidden, level) = critics_of_size(), mixed_batch()
    assert torch.equal(critics.q(hidden, level), critics.target_q(hidden, level))
    assert torch.equal(critics.v(hidden, level), critics.target_v(hidden, level))
    assert not critics.target_q(hidden.requires_grad_(), level).requires_grad
    assert all(not p.requires_grad for p in critics.target.parameters())


def test_low_precision_features_give_float32_values():
    critics, (hidden, level) = critics_of_size(), mixed_batch()
    values = critics.v(hidden.bfloat16(), level)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, critics.v(hidden.bfloat16().float(), level))


def test_polyak_by_hand():
    critics = critics_of_size()
    with torch.no_grad():
        for p in critics.online.parameters():
            p.fill_(2.0)
        for p in critics.target.parameters():
            p.fill_(1.0)
    critics.update_target(0.2)
    assert all(torch.allclose(p, torch.tensor(0.8 * 1 + 0.2 * 2)) for p in critics.target.parameters())
    assert all(p.eq(2.0).all() for p in critics.online.parameters())
    critics.update_target(0.2)
    assert all(torch.allclose(p, torch.tensor(0.8 * 1.2 + 0.2 * 2)) for p in critics.target.parameters())
    critics.update_target(1.0)
    assert all(p.eq(2.0).all() for p in critics.target.parameters())


def test_save_and_load_round_trip(tmp_path):
    critics, (hidden, level) = critics_of_size(), mixed_batch()
    with torch.no_grad():
        for p in critics.online.parameters():
            p.add_(0.1)  # online and target now differ
    save_critics(critics, tmp_path / "critic.safetensors")
    loaded = load_critics(tmp_path / "critic.safetensors", hidden_size=8)
    assert loaded.levels == critics.levels
    for method in ("q", "v", "target_q", "target_v"):
        assert torch.equal(getattr(loaded, method)(hidden, level), getattr(critics, method)(hidden, level))
    assert all(not p.requires_grad for p in loaded.target.parameters())


def test_load_says_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "critic.safetensors"
    save_critics(critics_of_size(D=8), path)
    with pytest.raises(ValueError, match="has hidden size 8, expected 16: load it with") as error:
        load_critics(path, hidden_size=16)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no critic at"):
        load_critics(tmp_path / "missing.safetensors")
