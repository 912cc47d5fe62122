"""GEGLU: half of what a feed-forward layer computes, gated by GELU of the other half.

    out = x[:, :n] * gelu(x[:, n:]),   gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))

Bytes: 2n numbers read and n written a row, 3 * rows * n * itemsize. Operations: some twenty a number, erf being most of
them, so memory is the limit. In two operations, as PyTorch does it, gelu's result is written and read once more: 5/3 of
the bytes.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch

NAME = "geglu"


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`x`: [..., 2n], contiguous, float32, float16 or bfloat16; returns [..., n] of the same dtype, computed in float32.

    Raises UserError for an odd last dimension, another layout or another dtype. Source: https://arxiv.org/abs/2002.05202.
    Introduced in notebooks/11_fused_kernels.
    """
    launch.check(NAME, x)
    launch.check_shape(NAME, "the input", x, tuple(x.shape))
    if x.ndim == 0 or x.shape[-1] % 2:
        raise UserError(f"{NAME} takes an even last dimension, values and gates; this one is of shape {list(x.shape)}")
    half = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], half)
    rows = out.numel() // max(1, half)
    grid, tall, wide = launch.tiles(rows, half)
    if rows and half:
        _geglu[grid](x, out, rows, half, tall, wide, num_warps=4)
    return out


def reference(x):
    """What `geglu` computes, by PyTorch, in the dtype of its argument."""
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def bytes_moved(x: torch.Tensor, *_) -> int:
    """Bytes that must come and go: `x` and half as much again."""
    return x.numel() * x.itemsize * 3 // 2


@triton.jit
def _geglu(x, out, rows, half, TALL: tl.constexpr, WIDE: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < half)[None, :]
    at = row.to(tl.int64)[:, None] * half + column[None, :]
    value = tl.load(x + at + row.to(tl.int64)[:, None] * half, inside, 0.0).to(tl.float32)
    gate = tl.load(x + at + (row.to(tl.int64)[:, None] + 1) * half, inside, 0.0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + at, (value * gelu).to(out.dtype.element_ty), inside)
