"""logprob._absorb as one Triton kernel: a row of the tile stays in registers, each logit is read once.

logprob.py uses it on CUDA where Triton is installed. With TRITON_INTERPRET=1 Triton's own interpreter runs it
on a CPU, slowly: so it is tested without a GPU. What this file does not do: matrix products (cuBLAS does).
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def absorb(logits, probs, target, sums):
    """As logprob._absorb: logits and probs (n, k), target (n,), sums (4, n) in place -> rescale (n,)."""
    (n, k), rescale = logits.shape, torch.empty_like(sums[0])
    strides, block = (logits.stride(0), probs.stride(0)), triton.next_power_of_2(k)
    _absorb[(n,)](logits, probs, target, *sums, rescale, k, *strides, BLOCK=block, num_warps=8)
    return rescale


@triton.jit
def _absorb(Z, P, Y, ZY, PEAK, TOTAL, SPREAD, RESCALE, k, z_stride, p_stride, BLOCK: tl.constexpr):
    """One program per token. Z logits, P probs, Y target's column, ZY its logit; the others as in sums."""
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z = tl.load(Z + row * z_stride + col, mask=col < k, other=float("-inf"))
    y, old_peak, total = tl.load(Y + row), tl.load(PEAK + row), tl.load(TOTAL + row)
    if (y >= 0) & (y < k):
        tl.store(ZY + row, tl.load(Z + row * z_stride + y))
    z = tl.where(col == y, float("-inf"), z)  # the rest
    peak = tl.maximum(old_peak, tl.max(z, 0))
    rescale, e = tl.exp(old_peak - peak), tl.exp(z - peak)
    tl.store(P + row * p_stride + col, e.to(P.dtype.element_ty), mask=col < k)
    spread = (tl.load(SPREAD + row) + (peak - old_peak) * total) * rescale
    tl.store(SPREAD + row, spread + tl.sum(e * tl.where(e > 0, peak - z, 0.0), 0))
    tl.store(TOTAL + row, total * rescale + tl.sum(e, 0))
    tl.store(PEAK + row, peak)
    tl.store(RESCALE + row, rescale)
