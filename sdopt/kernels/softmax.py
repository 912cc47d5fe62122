"""Softmax of attention's scores, a row at a time: from float32 to the dtype in which the next product wants its weights.

    out = exp(scale * (scores - max)) / sum of these,  over the last dimension

Two operations, a softmax and a rounding, would write the weights in float32 and read them again. Bytes: one read and one
write, 4 and 2 a number where the result is 16 bits wide: a row stays in its program's registers. One that is too long for them is
read twice.
"""

import torch
import triton
import triton.language as tl

from sdopt.kernels import launch

NAME = "softmax"
WIDE = 16384  # numbers of a row that a program holds: 32 for each of 512 threads


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`scores`: [..., length], contiguous, in float32, float16 or bfloat16; returns the weights in `dtype`.

    Computed in float32. Raises UserError for other layouts or dtypes. Source: https://arxiv.org/abs/1805.02867.
    Introduced in notebooks/11_fused_kernels.
    """
    launch.check(NAME, scores)
    launch.check_shape(NAME, "the input", scores, tuple(scores.shape))
    out = torch.empty_like(scores, dtype=dtype)
    length = scores.shape[-1] if scores.ndim else 1
    if scores.numel():
        wide = min(WIDE, triton.next_power_of_2(length))
        warps = 4 if wide <= 2048 else 8 if wide <= 8192 else 16
        whole = length <= wide
        launch.start(_softmax, (scores.numel() // length,), scores, out, length, scale, wide, whole, num_warps=warps)
    return out


def reference(scores, scale, dtype):
    """What `softmax` computes, by PyTorch."""
    return torch.softmax(scores * scale, -1).to(dtype)


def bytes_moved(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> int:
    """Bytes that must come and go: one read, one write."""
    return scores.numel() * (scores.itemsize + dtype.itemsize)


@triton.jit
def _softmax(scores, out, length, scale, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64) * length, tl.arange(0, WIDE)
    if WHOLE:
        s = tl.load(scores + row + k, k < length, -float("inf")).to(tl.float32) * scale
        weights = tl.exp(s - tl.max(s, 0))
        tl.store(out + row + k, (weights / tl.sum(weights, 0)).to(out.dtype.element_ty), k < length)
    else:
        top, total = -float("inf"), 0.0
        for start in range(0, length, WIDE):
            s = tl.load(scores + row + start + k, start + k < length, -float("inf")).to(tl.float32) * scale
            higher = tl.maximum(top, tl.max(s, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), 0)
            top = higher
        for start in range(0, length, WIDE):
            inside = start + k < length
            s = tl.load(scores + row + start + k, inside, -float("inf")).to(tl.float32) * scale
            tl.store(out + row + start + k, (tl.exp(s - top) / total).to(out.dtype.element_ty), inside)
