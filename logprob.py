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
Shapes: N tokens to score, V vocabulary, D hidden; B batch, T columns of a row; n and k, N and V of one tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import logprob_triton  # the tile kernel of CUDA, beside Triton
except ImportError:
    logprob_triton = None


def head_weight(lm_head: nn.Module, config=None) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) or None of a plain nn.Linear head.

    Reading `.weight` of a wrapped head would silently ignore its adapter, so anything else is a ValueError;
    so is a `config` that caps or rescales the logits after the head (Gemma 2, Cohere, Granite).
    """
    if type(lm_head) is not nn.Linear:
        found, fix = type(lm_head).__name__, "leave lm_head out of target_modules and modules_to_save"
        raise ValueError(f"lm_head is {found}, expected a plain nn.Linear: {fix}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if (value := getattr(config, name, None)) not in (None, 1.0):
            raise ValueError(f"{name}={value} changes the logits after lm_head: use a backbone without it")
    return lm_head.weight, lm_head.bias


def token_logprobs(hidden, weight, targets, bias=None, temperature=1.0, tile=None, entropy=False):
    """log pi(y|h) = z_y - logsumexp(z), z = (W h + b) / temperature: (N,) float32, float64 for float64 input.

    hidden (N, D), weight (V, D), targets (N,), bias (V,), where -inf bans a token. Differentiable once: in
    hidden, and in weight and bias if they require it. tile = (tokens, words) bounds the working memory.
    entropy=True: also -sum_v pi(v|h) log pi(v|h), (N,), its value alone, without a gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        found = f"{int(targets.min())}..{int(targets.max())}"
        raise ValueError(f"targets are {found}, expected 0..{len(weight) - 1}: leave ignored tokens out")
    # 4 MB of logits stay in a CPU's cache; a GPU's multipliers are all busy from rows * D of about 4 million.
    tile = tile or ((max(2048, 2**22 // hidden.shape[1]), 16384) if hidden.is_cuda else (512, 2048))
    logp, entropies = _TokenLogProb.apply(hidden, weight, targets, bias, 1.0 / temperature, tile, entropy)
    return (logp, entropies) if entropy else logp


def sequence_logprobs(
    hidden, weight, input_ids, action_mask, predictor=None, bias=None, temperature=1.0, tile=None
):
    """log pi(a_t | s, a_<t) on action tokens (EOS included), 0 elsewhere; its sum per row  (GLIDER eq. 6).

    hidden (B, T, D), input_ids (B, T), action_mask (B, T) bool -> (B, T) and (B,). Column t is predicted by
    hidden[:, t - 1], or hidden[:, predictor[:, t]]; column 0 has no predictor and stays 0. Only columns that
    predict an action token are read: the prompt, usually the larger part, and padding never reach the head.
    """
    B, T, D = hidden.shape
    row, before = action_mask[:, 1:].nonzero(as_tuple=True)
    column = before + 1
    before = before if predictor is None else predictor[row, column]
    rows = hidden.reshape(B * T, D).index_select(0, row * T + before)  # (N, D)
    logp = token_logprobs(rows, weight, input_ids[row, column], bias, temperature, tile)
    per_token = logp.new_zeros(B * T).index_copy(0, row * T + column, logp).view(B, T)
    return per_token, per_token.sum(1)


def _absorb(logits, probs, target, sums, entropy):
    """Takes a tile of logits (n, k), destroyed, into the sums so far; returns the rescale of older sums (n,).

    target (n,): its column in this tile; outside 0..k-1 it is in another. probs (n, k) <- exp(z - peak), 0 at
    the target, which is taken out before anything is rounded: a confident token is all rounding otherwise.
    sums (4, n): z_y; over the rest: peak = max z, total = sum of e = exp(z - peak), spread = sum of -e log e.
    """
    if logprob_triton and (logits.is_cuda or logprob_triton.INTERPRETED):
        return logprob_triton.absorb(logits, probs, target, sums)
    target_logit, peak, total, spread = sums
    column = target.clamp(0, logits.shape[1] - 1)[:, None]
    here, found = target[:, None] == column, logits.gather(1, column)
    target_logit.copy_(torch.where(here, found, target_logit[:, None])[:, 0])
    logits.scatter_(1, column, torch.where(here, -torch.inf, found))
    new_peak = torch.maximum(peak, logits.amax(1))  # online softmax: older sums move to the new peak
    rescale = (peak - new_peak).exp()
    logits.sub_(new_peak[:, None]).exp_()
    if entropy:
        spread.add_((new_peak - peak) * total).mul_(rescale).add_(torch.special.entr(logits).sum(1))
    total.mul_(rescale).add_(logits.sum(1))
    peak.copy_(new_peak)
    probs.copy_(logits)  # nothing to do where they are one buffer
    return rescale


def _matmul(out, left, right, add):
    """out = left @ right, or out += it: multiplied in the model's dtype, summed in that of out."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, beta=int(add), out_dtype=out.dtype, out=out)
    else:  # a CPU rounds bf16 products to bf16
        out.add_(left @ right) if add else out.copy_(left @ right)


def _tiles(hidden, weight, targets, bias, inv_temperature, tile):
    """Yields every tile: rows, cols, logits (W h + b) / temperature (n, k), room for probs, targets' columns.

    Two buffers serve all tiles: a fresh one costs as much as its matmul. That of probs, which the weights are
    multiplied with next, is in the model's dtype; it is the same one where that is the dtype of the logits.
    """
    (N, V), (n, k), dtype = (len(hidden), len(weight)), tile, torch.promote_types(hidden.dtype, torch.float32)
    wide = torch.empty(min(n, N), min(k, V), dtype=dtype, device=hidden.device)
    narrow = wide if dtype == hidden.dtype else torch.empty_like(wide, dtype=hidden.dtype)
    for i in range(0, N, n):
        for j in range(0, V, k):
            rows, cols = slice(i, min(i + n, N)), slice(j, min(j + k, V))
            logits, probs = (buffer[: rows.stop - i, : cols.stop - j] for buffer in (wide, narrow))
            _matmul(logits, hidden[rows], weight[cols].T, add=False)
            if bias is not None:
                logits.add_(bias[cols])
            yield rows, cols, logits.mul_(inv_temperature), probs, targets[rows] - j


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, inv_temperature, tile, entropy):
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.store_unit, ctx.settings = ctx.needs_input_grad[0] and not head_trains, (inv_temperature, tile)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros(4, len(hidden), dtype=dtype)
        target_logit, peak, total, spread = sums
        peak.fill_(torch.finfo(dtype).min)
        rest = torch.zeros_like(hidden, dtype=dtype) if ctx.store_unit else None  # sum of exp(z - peak) W
        for rows, cols, logits, probs, column in _tiles(hidden, weight, targets, bias, *ctx.settings):
            rescale = _absorb(logits, probs, column, sums[:, rows], entropy)
            if ctx.store_unit:
                _matmul(rest[rows].mul_(rescale[:, None]), probs, weight[cols], add=True)
        log_rest = peak + total.log()  # R
        margin = target_logit - log_rest
        logp, not_target = F.logsigmoid(margin), torch.sigmoid(-margin)  # log pi, 1 - pi
        total.clamp_min_(torch.finfo(dtype).tiny)  # it is 0, as rest is, where bias bans all but the target
        if ctx.store_unit:
            rest.div_(-total[:, None]).add_(weight[targets]).mul_((not_target * inv_temperature)[:, None])
            ctx.save_for_backward(rest.to(hidden.dtype))
        elif head_trains:
            ctx.save_for_backward(hidden, weight, targets, bias, torch.logaddexp(target_logit, log_rest))
        entropies = None
        if entropy:  # of "the target or not", then of which of the rest
            either = torch.special.entr(not_target) + torch.special.entr(logp.exp())
            entropies = either + not_target * (total.log() + spread / total)
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        if ctx.store_unit:
            return (upstream[:, None] * ctx.saved_tensors[0]).to(ctx.saved_tensors[0].dtype), *[None] * 6
        hidden, weight, targets, bias, log_z = ctx.saved_tensors
        d_hidden, d_weight = (torch.zeros_like(x, dtype=log_z.dtype) for x in (hidden, weight))
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=log_z.dtype)
        scale = -upstream * ctx.settings[0]
        for rows, cols, logits, probs, column in _tiles(hidden, weight, targets, bias, *ctx.settings):
            pi, inside = logits.sub_(log_z[rows, None]).exp_(), column.clamp(0, logits.shape[1] - 1)
            pi.scatter_add_(1, inside[:, None], -(column == inside)[:, None].to(pi.dtype))  # pi - onehot
            d_logits = pi.mul_(scale[rows, None])
            probs.copy_(d_logits)
            _matmul(d_hidden[rows], probs, weight[cols], add=True)
            _matmul(d_weight[cols], probs.T, hidden[rows], add=True)
            if bias is not None:
                d_bias[cols] += d_logits.sum(0)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, d_bias, None, None, None
