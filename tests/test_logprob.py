"""logprob.py against float64 log_softmax: values, gradients, masks, precision, memory, the Triton kernel."""

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical

import logprob
from logprob import head_weight, sequence_logprobs, token_logprobs

torch.set_num_threads(1)
TESTS, MB = Path(__file__).parent, 2**20


def reference_logits(hidden, weight, bias=None, temperature=1.0):
    logits = hidden.double() @ weight.double().T
    return (logits if bias is None else logits + bias.double()) / temperature


def reference(hidden, weight, targets, bias=None, temperature=1.0):
    logits = reference_logits(hidden, weight, bias, temperature)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def reference_entropy(*args, **kwargs):
    return Categorical(logits=reference_logits(*args, **kwargs)).entropy().detach()


def problem(N=37, D=16, V=211, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


def grad(output, *inputs, upstream=None):
    grads = torch.autograd.grad(output, inputs, upstream)
    return grads[0] if len(grads) == 1 else grads


def in_own_process(function, **environment):
    """A function of this file, called in a fresh process; what it asserts is asserted here."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    code = f"import test_logprob; test_logprob.{function.__name__}()"
    environment = os.environ | {"PYTHONPATH": path} | environment
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


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
    hot, entropy = token_logprobs(hidden, weight, targets, temperature=1e9, entropy=True)
    torch.testing.assert_close(hot, torch.full((37,), -math.log(211)).double())  # uniform in the limit
    torch.testing.assert_close(entropy, torch.full((37,), math.log(211)).double())
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, weight, targets, temperature=0)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_returns_float32(dtype, tolerance):
    hidden, weight, targets = problem(200, 64, 500, dtype, scale=0.3)
    logp, entropy = token_logprobs(hidden, weight, targets, entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - reference(hidden, weight, targets)).abs().max() < tolerance
    assert (entropy - reference_entropy(hidden, weight)).abs().max() < tolerance
    assert (logp <= 0).all()
    assert grad(logp.sum(), hidden).dtype == dtype


@pytest.mark.parametrize("trained", [False, True])
def test_confident_tokens_keep_their_gradient_in_bf16(trained):
    _, weight, _ = problem(1, 64, 500, torch.bfloat16)
    weight, targets = weight.requires_grad_(trained), torch.arange(100)
    hidden = (weight[targets].detach().float() * 0.22).bfloat16().requires_grad_()
    expected_logp = reference(hidden, weight, targets)
    assert expected_logp.exp().median() > 0.99
    actual = grad(token_logprobs(hidden, weight, targets).sum(), hidden).double()
    expected = grad(expected_logp.sum(), hidden).double()
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.05


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tile", [(200, 8), (1, 2000)])  # 250 tiles of words, 200 of tokens
def test_bf16_accumulates_in_float32(tile, trained):
    hidden, weight, targets = problem(200, 32, 2000, torch.bfloat16, scale=0.1)
    hidden, weight = hidden.detach() + 0.3, weight + 1  # sums that grow: all of their terms have one sign
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trained)][: 1 + trained]
    actual = torch.autograd.grad(token_logprobs(hidden, weight, targets, tile=tile).sum(), inputs)
    expected = torch.autograd.grad(reference(hidden.double(), weight.double(), targets).sum(), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() / e.double().norm() < 1e-2


def test_very_confident_token_is_not_rounded_to_zero():
    logits, target = torch.tensor([[21.0, 0.0, -1.0]]), torch.tensor([0])
    logp = token_logprobs(logits, torch.eye(3), target)
    assert logp.item() == pytest.approx(reference(logits, torch.eye(3), target).item(), rel=1e-4)
    assert logits.log_softmax(-1)[0, 0].item() == 0.0  # what log_softmax makes of it


@pytest.mark.parametrize("offset", [0.0, -1e5])  # one number added to all logits changes nothing
def test_extreme_logits_stay_finite(offset):
    hidden, weight, targets = problem(20, 4, 30, torch.float32, scale=1e4)
    bias = torch.full((30,), offset)
    logp, entropy = token_logprobs(hidden, weight, targets, bias=bias, tile=(6, 7), entropy=True)
    torch.testing.assert_close(logp, reference(hidden, weight, targets).float(), atol=0.1, rtol=1e-4)
    assert entropy.isfinite().all() and grad(logp.sum(), hidden).isfinite().all()


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
    banned, entropy = token_logprobs(hidden, weight, targets + 5, bias=bias, tile=(6, 7), entropy=True)
    assert banned.eq(-math.inf).all()
    torch.testing.assert_close(entropy, reference_entropy(hidden, weight[:3]))
    inputs, nothing = (hidden, weight) if trained else (hidden,), torch.zeros(20).double()  # nan if inf - inf
    assert all(d.eq(0).all() for d in torch.autograd.grad(banned, inputs, nothing))


@pytest.mark.parametrize("V", [1, 30])
def test_forced_token_has_probability_one_and_teaches_nothing(V):
    hidden, weight, _ = problem(20, 4, V)
    bias = torch.full((V,), -math.inf).double()
    bias[V // 2] = 0.0
    targets = torch.full((20,), V // 2)
    logp, entropy = token_logprobs(hidden, weight, targets, bias=bias, tile=(6, 7), entropy=True)
    assert logp.eq(0).all() and entropy.eq(0).all() and grad(logp.sum(), hidden).eq(0).all()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tile", [(5, 7), (8, 50), None])
def test_entropy_is_that_of_categorical_and_changes_nothing_else(tile, trained):
    hidden, weight, targets = problem()
    weight.requires_grad_(trained)
    bias, targets = torch.linspace(-2, 2, 211).double(), 60 + targets % 151
    bias[:60] = -math.inf  # whole tiles of the narrower ones; none of the targets
    options = {"bias": bias, "temperature": 0.7, "tile": tile}
    logp, entropy = token_logprobs(hidden, weight, targets, **options, entropy=True)
    torch.testing.assert_close(entropy, reference_entropy(hidden, weight, bias, temperature=0.7))
    assert not entropy.requires_grad
    without, inputs = token_logprobs(hidden, weight, targets, **options), [hidden, weight][: 1 + trained]
    assert torch.equal(logp, without)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (logp, without)), strict=True):
        assert torch.equal(a, b)


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


def test_the_same_call_gives_the_same_bits_and_part_of_a_batch_is_close():
    hidden, weight, targets = problem(300, 32, 1000, torch.float32)
    first, again, part = (token_logprobs(hidden[:n], weight, targets[:n]) for n in (300, 300, 7))
    assert torch.equal(first, again)
    torch.testing.assert_close(first[:7], part, atol=1e-5, rtol=1e-5)
    grads = [grad(logp.sum(), hidden) for logp in (first, again, part)]
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0][:7], grads[2][:7], atol=1e-5, rtol=1e-5)


def test_inputs_are_unchanged_and_no_grad_gives_the_same_values():
    hidden, weight, targets = problem()
    copies = hidden.detach().clone(), weight.clone(), targets.clone()
    logp = token_logprobs(hidden, weight, targets)
    grad(logp.sum(), hidden)
    with torch.no_grad():
        scored = token_logprobs(hidden, weight, targets)
    assert torch.equal(scored, logp) and not scored.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, targets), copies, strict=True))


def check_sequence(lengths, seed, poison=math.nan):
    """Ragged (prompt, answer) lengths: values, gradients and untouched rows against a full log_softmax."""
    generator = torch.Generator().manual_seed(seed)
    B, T, D, V = len(lengths), max(1, *(p + a for p, a in lengths)), 4, 13
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
    assert per_token[~mask].eq(0).all() and per_token[:, 0].eq(0).all()
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
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5), st.integers(0, 1000)
)
def test_ragged_masks(lengths, seed):
    check_sequence(lengths, seed)


def test_rows_without_an_answer():
    check_sequence([(3, 0), (1, 5), (4, 2), (0, 6)], seed=0)  # and a row that is nothing else
    check_sequence([(3, 0), (2, 0)], seed=0)  # nothing at all reaches the head


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("B", [0, 2])
def test_empty_batch_sums_to_zero_with_zero_gradients(B, trained):
    hidden, weight = torch.randn(B, 4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=trained)
    ids = torch.zeros(B, 4, dtype=torch.long)
    per_token, sums = sequence_logprobs(hidden, weight, ids, ids.bool())
    assert per_token.shape == (B, 4) and sums.shape == (B,) and sums.eq(0).all()
    for gradient in torch.autograd.grad(sums.sum(), [hidden, weight][: 1 + trained]):
        assert gradient.eq(0).all()


def test_predictor_scores_packed_answers_as_rows_of_their_own():
    layout = [(3, (2, 4)), (1, (3, 2))]  # row 0: a prompt of 3 columns, answers of 2 and 4; row 1: padded
    hidden, weight, _ = problem(18, 4, 13)
    hidden, ids = hidden.detach().view(2, 9, 4).requires_grad_(), torch.arange(18).view(2, 9) * 5 % 13
    mask, predictor = torch.zeros(2, 9, dtype=torch.bool), torch.full((2, 9), 8)  # elsewhere it is not read
    expected = []
    for row, (prompt, answers) in enumerate(layout):
        start = prompt
        for answer in answers:
            columns = torch.arange(start, start + answer)
            mask[row, columns], predictor[row, columns] = True, columns - 1
            predictor[row, start] = prompt - 1  # not the end of the answer before
            alone = torch.cat([torch.arange(prompt), columns])  # [prompt | this answer]
            scored = torch.arange(len(alone))[None] >= prompt
            per_token, _ = sequence_logprobs(hidden[row, alone][None], weight, ids[row, alone][None], scored)
            expected.append(per_token[scored])
            start += answer
    per_token, sums = sequence_logprobs(hidden, weight, ids, mask, predictor)
    expected, upstream = torch.cat(expected), torch.randn(11).double()
    torch.testing.assert_close(per_token[mask], expected)
    torch.testing.assert_close(sums, torch.stack([expected[:6].sum(), expected[6:].sum()]))
    torch.testing.assert_close(
        grad(per_token[mask], hidden, upstream=upstream), grad(expected, hidden, upstream=upstream)
    )


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


def check_kernel(device="cpu"):
    """The Triton kernel against the torch lines of logprob._absorb; whole tiles and single words banned."""
    shapes = [(5, 3), (100, 64), (700, 128), (3000, 1024)] + [(40_000, 16_384)] * (device == "cuda")  # V, k
    for V, k in shapes:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)):
            hidden, weight, targets = (x.to(device) for x in problem(21, 16, V, dtype, seed=V))
            words = torch.arange(V, device=device)
            bias = torch.where((words // k % 4 == 0) | (words % 3 == 0), -math.inf, 0.0)  # some targets too
            module, results = logprob.logprob_triton, []
            kernel = Mock(wraps=module, INTERPRETED=module.INTERPRETED)
            for used in (kernel, None):
                with patch.object(logprob, "logprob_triton", used):
                    x = hidden.detach().requires_grad_()
                    logp, entropy = token_logprobs(x, weight, targets, bias=bias, tile=(4, k), entropy=True)
                    results.append((logp, entropy, grad(logp, x, upstream=torch.ones_like(logp))))
            assert kernel.absorb.called
            (*values, gradient), (*torch_values, torch_gradient) = results
            torch.testing.assert_close(values, torch_values, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gradient, torch_gradient, atol=tolerance, rtol=tolerance)


def test_triton_kernel_under_its_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: nothing to compare")
    in_own_process(check_kernel, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernel_on_cuda():
    pytest.importorskip("triton", reason="Triton is not installed: nothing to compare")
    check_kernel("cuda")


def check_memory():
    """Peak resident memory of a forward and backward: 2,048 response rows of 8,192, D 256, V 32,000, fp32."""
    hidden, weight, ids = (
        torch.randn(16, 512, 256),
        torch.randn(32_000, 256),
        torch.randint(32_000, (16, 512)),
    )
    mask = torch.zeros(16, 512, dtype=torch.bool)
    mask[:, 100:228] = True

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def extra(score):
        leaf = hidden.requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
        before = peak()
        grad(score(leaf), leaf)
        return (peak() - before) / MB

    def naive(hidden):
        rows = hidden[:, 99:227].flatten(0, 1)
        return (rows @ weight.T).log_softmax(-1).gather(1, ids[mask][:, None]).sum()

    ours = extra(lambda hidden: sequence_logprobs(hidden, weight, ids, mask)[1].sum())
    log_softmax = extra(naive)
    print(f"{ours:.0f} MB, log_softmax {log_softmax:.0f} MB")
    assert ours < 40 and log_softmax > 700


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is reset as Linux does")
def test_memory_does_not_grow_with_the_vocabulary():
    in_own_process(check_memory, TRITON_INTERPRET="0")
