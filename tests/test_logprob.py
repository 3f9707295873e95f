"""logprob.py against float64 log_softmax: values, gradients, masks, precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from logprob import head_weight, sequence_logprobs, token_logprobs

torch.set_num_threads(1)


def reference(hidden, weight, targets, bias=None, temperature=1.0):
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def problem(N=37, D=16, V=211, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


def grad(output, *inputs, upstream=None):
    grads = torch.autograd.grad(output, inputs, upstream)
    return grads[0] if len(grads) == 1 else grads


@pytest.mark.parametrize("tile", [(1, 1), (128, 50), (64, 211), (1000, 1000)])
@pytest.mark.parametrize("N", [1, 127, 128, 129, 300])
def test_values_and_gradients_equal_log_softmax(N, tile):
    if tile == (1, 1):
        N = N % 5 + 1  # one matmul per logit is slow; the edges of its row tiles are all alike
    hidden, weight, targets = problem(N)
    bias, upstream = torch.randn(211).double(), torch.randn(N).double()  # signed, as advantages are
    logp = token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, tile=tile)
    expected = reference(hidden, weight, targets, bias, temperature=0.7)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(
        grad(logp, hidden, upstream=upstream), grad(expected, hidden, upstream=upstream)
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tile", [(2, 3), (5, 7), None])
def test_gradcheck(trained, tile):
    hidden, weight, targets = problem(5, 4, 7)
    bias = torch.randn(7).double()
    for leaf in (weight, bias):
        leaf.requires_grad_(trained)

    def function(hidden, weight, bias):
        return token_logprobs(hidden, weight, targets, bias=bias, temperature=1.3, tile=tile)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_trained_head_on_frozen_hidden_states():
    hidden, weight, targets = problem()
    hidden, weight = hidden.detach(), weight.requires_grad_()
    actual = grad(token_logprobs(hidden, weight, targets, tile=(8, 50)).sum(), weight)
    torch.testing.assert_close(actual, grad(reference(hidden, weight, targets).sum(), weight))


@pytest.mark.parametrize("trained", [False, True])
def test_any_upstream_gradient(trained):
    hidden, weight, targets = problem()
    weight.requires_grad_(trained)

    def loss(logp):  # ratios, squares and a product over tokens, not just a sum
        return (logp.exp() * torch.arange(37.0)).sum() + logp.pow(2).sum() + logp[:5].sum().exp()

    actual = grad(loss(token_logprobs(hidden, weight, targets)), hidden)
    torch.testing.assert_close(actual, grad(loss(reference(hidden, weight, targets)), hidden))


def test_probabilities_sum_to_one():
    hidden, weight, _ = problem(3, 8, 50)
    logp = token_logprobs(hidden.repeat_interleave(50, 0), weight, torch.arange(50).repeat(3), tile=(7, 11))
    torch.testing.assert_close(logp.exp().view(3, 50).sum(1), torch.ones(3).double())
    assert (logp <= 0).all()


def test_temperature_flattens_and_is_validated():
    hidden, weight, targets = problem()
    hot = token_logprobs(hidden, weight, targets, temperature=1e9)
    torch.testing.assert_close(hot, torch.full((37,), -math.log(211)).double())  # uniform in the limit
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, weight, targets, temperature=0)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_returns_float32(dtype, tolerance):
    hidden, weight, targets = problem(200, 64, 500, dtype, scale=0.3)
    logp = token_logprobs(hidden, weight, targets)
    assert logp.dtype == torch.float32
    assert (logp - reference(hidden, weight, targets)).abs().max() < tolerance
    assert (logp <= 0).all()
    assert grad(logp.sum(), hidden).dtype == dtype


def test_confident_tokens_keep_their_gradient_in_bf16():
    weight, targets = (
        torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.arange(100),
    )
    hidden = (weight[targets].float() * 0.22).bfloat16().requires_grad_()
    expected_logp = reference(hidden, weight, targets)
    assert expected_logp.exp().median() > 0.99
    actual = grad(token_logprobs(hidden, weight, targets).sum(), hidden).double()
    expected = grad(expected_logp.sum(), hidden.requires_grad_()).double()
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.05


@pytest.mark.parametrize("trained", [False, True])
def test_bf16_accumulates_in_float32(trained):
    hidden, weight, targets = problem(32, 32, 4000, torch.bfloat16, scale=0.3)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    weight.requires_grad_(trained)
    inputs, exact = (
        ([hidden, weight], [exact_hidden, exact_weight]) if trained else ([hidden], [exact_hidden])
    )
    actual = torch.autograd.grad(token_logprobs(hidden, weight, targets, tile=(4, 16)).sum(), inputs)
    expected = torch.autograd.grad(reference(exact_hidden, exact_weight, targets).sum(), exact)
    for a, e in zip(actual, expected, strict=True):  # 250 column tiles, 16 row tiles
        assert (a.double() - e).norm() / e.norm() < 7e-3


def test_very_confident_token_is_not_rounded_to_zero():
    logits, target = torch.tensor([[21.0, 0.0, -1.0]]), torch.tensor([0])
    logp = token_logprobs(logits, torch.eye(3), target)
    assert logp.item() == pytest.approx(reference(logits, torch.eye(3), target).item(), rel=1e-4)
    assert logits.log_softmax(-1)[0, 0].item() == 0.0  # what log_softmax makes of it


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(20, 4, 30, torch.float32, scale=1e4)
    logp = token_logprobs(hidden, weight, targets, tile=(6, 7))
    assert logp.isfinite().all() and grad(logp.sum(), hidden).isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_bias_minus_infinity_bans_tokens(trained):
    hidden, weight, _ = problem(20, 4, 30)
    bias = torch.full((30,), -math.inf).double()
    bias[:3] = 0.0
    targets = torch.arange(20) % 3
    expected = reference(hidden, weight[:3], targets)  # as if the vocabulary had three words
    weight.requires_grad_(trained)
    logp = token_logprobs(hidden, weight, targets, bias=bias, tile=(6, 7))
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(grad(logp.sum(), hidden), grad(expected.sum(), hidden))
    assert token_logprobs(hidden, weight, targets + 5, bias=bias).eq(-math.inf).all()


@pytest.mark.parametrize("V", [1, 30])
def test_forced_token_has_probability_one_and_teaches_nothing(V):
    hidden, weight, _ = problem(20, 4, V)
    bias = torch.full((V,), -math.inf).double()
    bias[V // 2] = 0.0
    logp = token_logprobs(hidden, weight, torch.full((20,), V // 2), bias=bias, tile=(6, 7))
    assert logp.eq(0).all() and grad(logp.sum(), hidden).eq(0).all()


def test_targets_outside_the_vocabulary_are_refused():
    hidden, weight, targets = problem()
    for wrong in (-100, 211):
        with pytest.raises(ValueError, match="leave ignored tokens out"):
            token_logprobs(hidden, weight, torch.cat([targets[:-1], torch.tensor([wrong])]))


@pytest.mark.parametrize("trained", [False, True])
def test_double_backward_is_refused(trained):
    hidden, weight, targets = problem()
    weight.requires_grad_(trained)
    logp = token_logprobs(hidden, weight, targets)
    (first,) = torch.autograd.grad(logp.pow(2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_inputs_are_unchanged_and_no_grad_gives_the_same_values():
    hidden, weight, targets = problem()
    copies = hidden.detach().clone(), weight.clone(), targets.clone()
    logp = token_logprobs(hidden, weight, targets)
    grad(logp.sum(), hidden)
    with torch.no_grad():
        assert torch.equal(token_logprobs(hidden, weight, targets), logp)
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, targets), copies, strict=True))


def check_sequence(lengths, seed, poison=math.nan):
    """Ragged (prompt, answer) lengths: values, gradients and untouched rows against a full log_softmax."""
    generator = torch.Generator().manual_seed(seed)
    B, T, D, V = len(lengths), max(p + a for p, a in lengths) + 1, 4, 13
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(lengths):
        mask[row, prompt : prompt + answer] = True
    per_token, sums = sequence_logprobs(hidden, weight, input_ids, mask, tile=(5, 4))
    logp = (hidden[:, :-1] @ weight.T).log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    expected = torch.where(mask[:, 1:], logp, 0.0)  # (B, T-1): column t of per_token is column t-1 here
    torch.testing.assert_close(per_token[:, 1:], expected)
    torch.testing.assert_close(sums, expected.sum(1))
    assert per_token[~mask].eq(0).all()
    upstream = torch.randn(B, generator=generator, dtype=torch.float64)
    actual = grad(sums, hidden, upstream=upstream)
    torch.testing.assert_close(actual, grad(expected.sum(1), hidden, upstream=upstream))
    predicts = torch.cat([mask[:, 1:], torch.zeros(B, 1, dtype=torch.bool)], dim=1)
    poisoned = torch.where(predicts[..., None], hidden.detach(), poison).requires_grad_()
    poisoned_sums = sequence_logprobs(poisoned, weight, input_ids, mask, tile=(5, 4))[1]
    assert torch.equal(poisoned_sums, sums)
    assert torch.equal(grad(poisoned_sums, poisoned, upstream=upstream), actual)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5), st.integers(0, 1000)
)
def test_ragged_masks(lengths, seed):
    check_sequence(lengths, seed)


def test_rows_without_an_answer():
    check_sequence([(3, 0), (1, 5), (4, 2)], seed=0)
    check_sequence([(3, 0), (2, 0)], seed=0)  # nothing at all reaches the head


def test_mask_with_holes_and_infinite_poison():
    hidden, weight, _ = problem(12, 4, 13)
    hidden, ids = hidden.view(2, 6, 4), torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]).bool()
    per_token, _ = sequence_logprobs(hidden, weight, ids, mask)
    assert per_token[0, 3].item() == pytest.approx(reference(hidden[0, 2:3], weight, ids[0, 3:4]).item())
    assert torch.equal(per_token != 0, mask)
    check_sequence([(2, 3), (4, 1)], seed=1, poison=math.inf)


def test_head_weight_accepts_only_a_plain_linear():
    head = nn.Linear(4, 9)
    weight, bias = head_weight(head)
    assert weight is head.weight and bias is head.bias
    assert head_weight(nn.Linear(4, 9, bias=False))[1] is None

    class LoraLinear(nn.Linear):
        pass

    for wrapped in (LoraLinear(4, 9), nn.Sequential(head)):
        with pytest.raises(ValueError, match=type(wrapped).__name__):
            head_weight(wrapped)


def test_head_weight_refuses_what_happens_after_the_head():
    class Config:
        final_logit_softcapping = 30.0

    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        head_weight(nn.Linear(4, 9), Config())
    Config.final_logit_softcapping, Config.logits_scaling = None, 1.0
    head_weight(nn.Linear(4, 9), Config())
