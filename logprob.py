"""log pi(token) under an LM head, without ever holding the [B, T, vocab] logits.

For a token y with hidden state h let z = (W h + b) / temperature and R = logsumexp of all logits EXCEPT z_y:

    log pi(y) = z_y - logsumexp(z) = logsigmoid(z_y - R)             "the target against the rest"
    d log pi(y) / dh = (1 - pi(y)) (W_y - E_rest[W]) / temperature   =: unit, a vector of size D

E_rest[W] is the mean of the rows of W under the softmax over the rest: attention with query h and keys =
values = W. So both sums over the vocabulary run tile by tile with a running maximum (online softmax, as in
FlashAttention, arXiv:2205.14135). `unit` does not depend on the loss: with a frozen head (LoRA) forward
stores it, and backward is upstream * unit for ANY upstream gradient (4 N D V flops). A trained head needs dW,
which does depend on the loss, so backward computes the logits once more.

What this file does not do: capped or rescaled logits, adapters on the head, second derivatives.
Shapes: N tokens to score, V vocabulary, D hidden; B batch, T tokens of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_TILE = (512, 2048)  # (tokens, vocabulary): 4 MB of float32 logits, which stays in a CPU's cache


def head_weight(lm_head: nn.Module, config: Any = None) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) or None of a plain nn.Linear head.

    Reading `.weight` of a wrapped head would silently ignore its adapter, so anything else is a ValueError;
    so is a `config` that caps or rescales the logits after the head (Gemma 2, Cohere, Granite).
    """
    if type(lm_head) is not nn.Linear:
        found, fix = type(lm_head).__name__, "leave lm_head out of target_modules and modules_to_save"
        raise ValueError(f"lm_head is {found}, expected a plain nn.Linear: {fix}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if value not in (None, 1.0):
            raise ValueError(f"{name}={value} changes the logits after lm_head: use a backbone without it")
    return lm_head.weight, lm_head.bias


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """log pi(y|h) = z_y - logsumexp(z), z = (W h + b) / temperature: (N,) float32, float64 for float64 input.

    hidden (N, D), weight (V, D), targets (N,), bias (V,), where -inf bans a token. tile = (tokens, words)
    bounds the working memory. Differentiable once: in hidden, and in weight and bias if they require it.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        found = f"{int(targets.min())}..{int(targets.max())}"
        raise ValueError(f"targets are {found}, expected 0..{len(weight) - 1}: leave ignored tokens out")
    return _TokenLogProb.apply(hidden, weight, targets, bias, 1.0 / temperature, tile or DEFAULT_TILE)


def sequence_logprobs(
    hidden: Tensor, weight: Tensor, input_ids: Tensor, action_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """log pi(a_t | s, a_<t) on action tokens (EOS included), 0 elsewhere; its sum per row  (GLIDER eq. 6).

    hidden (B, T, D), input_ids (B, T), action_mask (B, T) bool -> (B, T) and (B,). Column t is predicted by
    hidden[:, t - 1]; column 0 has no predictor and stays 0. Only rows that predict an action token are read:
    the prompt, usually the larger part, and the padding never reach the head.
    """
    B, T, D = hidden.shape
    row, before = action_mask[:, 1:].nonzero(as_tuple=True)  # (N,); token before + 1 is predicted at `before`
    predictor = row * T + before  # (N,) into the flattened (B * T)
    rows = hidden.reshape(B * T, D).index_select(0, predictor)  # (N, D)
    logp = token_logprobs(rows, weight, input_ids[row, before + 1], **kwargs)
    per_token = logp.new_zeros(B * T).index_copy(0, predictor + 1, logp).view(B, T)
    return per_token, per_token.sum(1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _targets_inside(targets: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """The tokens whose target lies in this slice of the vocabulary, and its column there."""
    (here,) = ((targets >= cols.start) & (targets < cols.stop)).nonzero(as_tuple=True)
    return here, targets[here] - cols.start


class _LogitTiles:
    """(W h + b) / temperature, one tile at a time, in float32 (float64) buffers that are reused.

    The matmul runs in the model's dtype. Allocating each tile afresh would cost as much as computing it.
    """

    def __init__(self, hidden, weight, bias, inv_temperature, tile):
        self.hidden, self.weight, self.bias, self.inv_temperature = hidden, weight, bias, inv_temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.rows, self.cols = _slices(len(hidden), tile[0]), _slices(len(weight), tile[1])
        shape = min(tile[0], len(hidden)), min(tile[1], len(weight))
        self.logits = torch.empty(shape, dtype=self.dtype, device=hidden.device)
        widened = hidden.dtype != self.dtype
        self.product = torch.empty_like(self.logits, dtype=hidden.dtype) if widened else self.logits

    def __call__(self, rows: slice, cols: slice) -> Tensor:
        hidden, weight = self.hidden[rows], self.weight[cols]
        logits = self.logits[: len(hidden), : len(weight)]
        product = torch.mm(hidden, weight.T, out=self.product[: len(hidden), : len(weight)])
        if product.dtype != logits.dtype:
            logits.copy_(product)
        if self.bias is not None:
            logits.add_(self.bias[cols])
        return logits.mul_(self.inv_temperature)


def _matmul_into(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right: multiplied in right's dtype (the model's), accumulated in total's (float32)."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, inv_temperature, tile):
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        store_unit = ctx.needs_input_grad[0] and not head_trains
        tiles = _LogitTiles(hidden, weight, bias, inv_temperature, tile)
        logp = torch.empty(len(hidden), dtype=tiles.dtype, device=hidden.device)
        log_z = torch.empty_like(logp)  # logsumexp of all logits, for backward's second pass
        unit = torch.empty_like(hidden) if store_unit else None
        for rows in tiles.rows:
            target_logit = torch.zeros_like(logp[rows])
            peak = torch.full_like(target_logit, torch.finfo(tiles.dtype).min)  # maximum over the rest so far
            total = torch.zeros_like(target_logit)  # sum of exp(z - peak) over the rest
            rest = torch.zeros_like(hidden[rows], dtype=tiles.dtype)  # sum of exp(z - peak) * W over the rest
            for cols in tiles.cols:
                logits = tiles(rows, cols)
                # Take the target out before anything is rounded: a confident token is all rounding otherwise.
                here, column = _targets_inside(targets[rows], cols)
                target_logit[here] = logits[here, column]
                logits[here, column] = -torch.inf
                # Online softmax: what was summed under the old peak is rescaled to the new one.
                new_peak = torch.maximum(peak, logits.amax(1))
                rescale = (peak - new_peak).exp()
                peak = new_peak
                logits.sub_(peak[:, None]).exp_()
                total.mul_(rescale).add_(logits.sum(1))
                if store_unit:
                    _matmul_into(rest.mul_(rescale[:, None]), logits, weight[cols])
            log_rest = peak + total.log()
            logp[rows] = F.logsigmoid(target_logit - log_rest)
            log_z[rows] = torch.logaddexp(target_logit, log_rest)
            if store_unit:
                not_target = (log_rest - target_logit).sigmoid() * inv_temperature  # (1 - pi) / temperature
                # A forced token (bias -inf on all others) has total = 0 and rest = 0.
                mean_rest = rest / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
                unit[rows] = (not_target[:, None] * (weight[targets[rows]] - mean_rest)).to(unit.dtype)
        ctx.settings, ctx.has_unit = (inv_temperature, tile), store_unit
        if store_unit:
            ctx.save_for_backward(unit)
        elif head_trains:
            ctx.save_for_backward(hidden, weight, targets, bias, log_z)
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.has_unit:
            (unit,) = ctx.saved_tensors
            return (upstream[:, None] * unit).to(unit.dtype), None, None, None, None, None
        hidden, weight, targets, bias, log_z = ctx.saved_tensors
        inv_temperature, _ = ctx.settings
        tiles = _LogitTiles(hidden, weight, bias, *ctx.settings)
        d_hidden = torch.zeros_like(hidden, dtype=tiles.dtype)
        d_weight = torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        for cols in tiles.cols:
            d_weight_tile = torch.zeros_like(weight[cols], dtype=tiles.dtype)
            d_bias_tile = torch.zeros_like(weight[cols, 0], dtype=tiles.dtype)
            for rows in tiles.rows:
                d_logits = tiles(rows, cols).sub_(log_z[rows, None]).exp_()  # pi
                d_logits[_targets_inside(targets[rows], cols)] -= 1  # pi - onehot
                d_logits.mul_(-inv_temperature * upstream[rows, None])
                _matmul_into(d_hidden[rows], d_logits, weight[cols])
                _matmul_into(d_weight_tile, d_logits.T, hidden[rows])
                d_bias_tile += d_logits.sum(0)
            d_weight[cols] = d_weight_tile
            if d_bias is not None:
                d_bias[cols] = d_bias_tile
        return d_hidden.to(hidden.dtype), d_weight, None, d_bias, None, None
