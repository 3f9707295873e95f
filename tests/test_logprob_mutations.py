"""Put a bug into logprob.py: the test that guards the line fails, by its claim and not by a crash.

CASES names the test of test_logprob.py, then bugs that it finds: in words, our line, the faulty one.
"""

import importlib
import sys
from collections import ChainMap
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from test_mutations import put_back
from torch.autograd.gradcheck import GradcheckError

torch.set_num_threads(1)
FAILURES = (AssertionError, GradcheckError, pytest.fail.Exception)  # the last: "did not raise"


@contextmanager
def fresh_tests():
    """The module test_logprob imported anew: it tests the logprob that an import sees now."""
    kept = sys.modules.pop("test_logprob", None)
    try:
        yield importlib.import_module("test_logprob")
    finally:
        sys.modules.pop("test_logprob", None)
        if kept:
            sys.modules["test_logprob"] = kept


def run_test(test):
    """Calls a test once for every combination of its parametrize marks."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args[0].split(","), mark.args[1]
        choices.append([dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in values])
    for chosen in product(*choices):
        test(**dict(ChainMap(*chosen)))


# fmt: off
SPREAD = "    spread.add_((new_peak - peak) * total).mul_(rescale).add_(torch.special.entr(logits).sum(1))\n"
CASES = {
    "test_gradcheck": [
        ("older tiles keep their peak in the mean of W",
            "rest[rows].mul_(rescale[:, None])", "rest[rows]"),
        ("the bias of the first tile is everybody's",
            "logits.add_(bias[cols])", "logits.add_(bias[: logits.shape[1]])"),
        ("the gradient forgets 1 - pi",
            "(not_target * inv_temperature)", "(torch.ones_like(not_target) * inv_temperature)"),
        ("the gradient forgets 1 / temperature",
            "(not_target * inv_temperature)", "(not_target)"),
        ("the recomputed gradient forgets 1 / temperature",
            "scale = -upstream * ctx.settings[0]", "scale = -upstream"),
        ("d bias is that of the last tile of tokens",
            "d_bias[cols] += d_logits.sum(0)", "d_bias[cols] = d_logits.sum(0)"),
    ],
    "test_values_and_gradients_equal_log_softmax": [
        ("the bias is not divided by the temperature",
            "logits.add_(bias[cols])", "logits.add_(bias[cols] / inv_temperature)"),
        ("the target's column counts from the first tile",
            "targets[rows] - j", "targets[rows]"),
    ],
    "test_trained_head_on_frozen_hidden_states": [
        ("dW is that of the last tile of tokens",
            "_matmul(d_weight[cols], probs.T, hidden[rows], add=True)",
            "_matmul(d_weight[cols], probs.T, hidden[rows], add=False)"),
        ("pi alone, not pi - onehot",
            "pi.scatter_add_(1, inside[:, None], -(column == inside)[:, None].to(pi.dtype))", "pass"),
    ],
    "test_any_upstream_gradient": [
        ("all tokens get the upstream gradient of the first",
            "(upstream[:, None] * ctx", "(upstream[:1, None] * ctx"),
        ("pi is normalised over the rest",
            "torch.logaddexp(target_logit, log_rest)", "log_rest"),
    ],
    "test_probabilities_sum_to_one": [
        ("older tiles keep their peak in the total",
            "total.mul_(rescale).add_(logits.sum(1))", "total.add_(logits.sum(1))"),
        ("the running maximum is not kept",
            "peak.copy_(new_peak)", "pass"),
        ("the target's logit is read from the last tile",
            "torch.where(here, found, target_logit[:, None])[:, 0]", "found[:, 0]"),
        ("the target is left in the rest",
            "logits.scatter_(1, column, torch.where(here, -torch.inf, found))", "pass"),
        ("a word is taken out also where the target is in another tile",
            "torch.where(here, -torch.inf, found)", "torch.full_like(found, -torch.inf)"),
        ("the odds of the target are inverted",
            "F.logsigmoid(margin)", "F.logsigmoid(-margin)"),
    ],
    "test_low_precision_returns_float32": [
        ("log pi is rounded to the model's dtype",
            "return logp, entropies", "return logp.to(hidden.dtype), entropies"),
    ],
    "test_confident_tokens_keep_their_gradient_in_bf16": [
        ("pi is rounded before the onehot is subtracted",
            "logits.sub_(log_z[rows, None]).exp_()",
            "logits.copy_(logits.sub_(log_z[rows, None]).exp_().to(hidden.dtype))"),
    ],
    "test_bf16_accumulates_in_float32": [
        ("the mean of W is summed in bf16",
            "rest = torch.zeros_like(hidden, dtype=dtype)", "rest = torch.zeros_like(hidden)"),
        ("the mean of W is that of the last tile of words",
            "out.add_(left @ right) if add else out.copy_(left @ right)", "out.copy_(left @ right)"),
        ("d hidden is summed in bf16",
            "(torch.zeros_like(x, dtype=log_z.dtype) for x in (hidden, weight))",
            "(torch.zeros_like(hidden), torch.zeros_like(weight, dtype=log_z.dtype))"),
        ("dW is summed in bf16",
            "(torch.zeros_like(x, dtype=log_z.dtype) for x in (hidden, weight))",
            "(torch.zeros_like(hidden, dtype=log_z.dtype), torch.zeros_like(weight))"),
    ],
    "test_very_confident_token_is_not_rounded_to_zero": [
        ("log pi is computed from a sum that holds the target",
            "F.logsigmoid(margin)", "target_logit - torch.logaddexp(target_logit, peak + total.log())"),
    ],
    "test_extreme_logits_stay_finite": [
        ("the running maximum starts at 0",
            "peak.fill_(torch.finfo(dtype).min)", "peak.fill_(0)"),
    ],
    "test_bias_minus_infinity_bans_tokens": [
        ("the running maximum starts at -inf",
            "peak.fill_(torch.finfo(dtype).min)", "peak.fill_(-torch.inf)"),
    ],
    "test_forced_token_has_probability_one_and_teaches_nothing": [
        ("a forced token divides by 0",
            "total.clamp_min_(torch.finfo(dtype).tiny)", "pass"),
    ],
    "test_double_backward_is_refused": [
        ("a second derivative is wrong instead of refused",
            "    @torch.autograd.function.once_differentiable\n", ""),
    ],
    "test_entropy_is_that_of_categorical_and_changes_nothing_else": [
        ("older tiles keep their peak inside the spread",
            "spread.add_((new_peak - peak) * total).mul_(rescale)", "spread.mul_(rescale)"),
        ("older tiles keep their peak around the spread",
            "spread.add_((new_peak - peak) * total).mul_(rescale)", "spread.add_((new_peak - peak) * total)"),
        ("the older spread is shifted by the newer total",
            f"    if entropy:\n    {SPREAD}    total.mul_(rescale).add_(logits.sum(1))\n",
            f"    total.mul_(rescale).add_(logits.sum(1))\n    if entropy:\n    {SPREAD}"),
        ("the spread is that of the last tile",
            ".add_(torch.special.entr(logits).sum(1))", ".copy_(torch.special.entr(logits).sum(1))"),
        ("the doubt between the target and the rest is left out",
            "entropies = either + not_target", "entropies = not_target"),
        ("the target's own term is left out",
            " + torch.special.entr(logp.exp())", ""),
        ("the rest's own term is left out",
            "torch.special.entr(not_target) + ", ""),
        ("the doubt among the rest counts in full",
            "either + not_target * (total", "either + (total"),
        ("the spread is not normalised",
            "spread / total", "spread"),
        ("the entropy seems to have a gradient",
            "ctx.mark_non_differentiable(entropies)", "pass"),
    ],
    "test_rows_without_an_answer": [
        ("the mask is not shifted",
            "action_mask[:, 1:].nonzero", "action_mask[:, :-1].nonzero"),
        ("a token is predicted by its own hidden state",
            "before = before if predictor is None", "before = column if predictor is None"),
        ("the token before is scored",
            "input_ids[row, column]", "input_ids[row, before]"),
    ],
    "test_mask_with_holes_and_infinite_poison": [
        ("all rows read the hidden states of the first",
            "index_select(0, row * T + before)", "index_select(0, before)"),
        ("a log-prob is put where it was predicted",
            "index_copy(0, row * T + column, logp)", "index_copy(0, row * T + before, logp)"),
    ],
    "test_predictor_scores_packed_answers_as_rows_of_their_own": [
        ("the predictor is ignored",
            "before = before if predictor is None else predictor[row, column]", "pass"),
        ("the predictor is not shifted",
            "predictor[row, column]", "predictor[row, before]"),
        ("all rows use the predictor of the first",
            "predictor[row, column]", "predictor[0, column]"),
    ],
    "test_targets_outside_the_vocabulary_are_refused": [
        ("-100 is taken for a word",
            "not 0 <= int(targets.min())", "not -100 <= int(targets.min())"),
    ],
    "test_head_weight_accepts_only_a_plain_linear": [
        ("an adapter on the head is ignored",
            "type(lm_head) is not nn.Linear", "not isinstance(lm_head, nn.Linear)"),
    ],
    "test_head_weight_refuses_what_happens_after_the_head": [
        ("capped logits are taken for plain ones",
            "not in (None, 1.0)", "not in (None, 1.0, 30.0)"),
    ],
}
# fmt: on
BUGS = [pytest.param(name, old, new, id=bug) for name, bugs in CASES.items() for bug, old, new in bugs]


def test_these_tests_pass_on_our_code():
    with fresh_tests() as tests:
        for name in CASES:
            run_test(getattr(tests, name))


@pytest.mark.parametrize("name, old, new", BUGS)
def test_a_bug_put_in_fails_its_test(name, old, new):
    with put_back("logprob", old, new), fresh_tests() as tests, pytest.raises(FAILURES):
        run_test(getattr(tests, name))
