"""GEGLU: half of what a feed-forward layer computes, gated by GELU of the other half.

    out = x[:, :n] * gelu(x[:, n:]),   gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))

Bytes: 2n numbers read and n written a row, 3 * rows * n * itemsize. Operations: some twenty a number, erf being most of
them, so memory is the limit. In two operations, as PyTorch does it, gelu's result is written and read once more: 5/3 of
the bytes.

With a scale a row (see `to_float8`) a program has to see the whole row before it can write any of it in e4m3: it holds it in
its registers, as two tiles, since a row of n = 5 * 2**k numbers (a UNet's widths are such) would leave 3/8 of one empty.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch, to_float8
from sdopt.kernels.to_float8 import Scaled, in_e4m3

NAME = "geglu"
LONGEST = 16384  # numbers of a row that a program can hold


def geglu(x: torch.Tensor, scales: str | torch.Tensor | None = None) -> torch.Tensor | Scaled:
    """`x`: [..., 2n], contiguous, float32, float16 or bfloat16; returns [..., n] of the same dtype, computed in float32.

    With `scales`, "row" or one number for all, it comes in e4m3, as `to_float8` returns it.
    Raises UserError for an odd last dimension, another layout or another dtype. Source: https://arxiv.org/abs/2002.05202.
    Introduced in notebooks/11_fused_kernels, `scales` in notebooks/13_fp8.
    """
    launch.check(NAME, x)
    launch.check_shape(NAME, "the input", x, tuple(x.shape))
    if x.ndim == 0 or x.shape[-1] % 2:
        raise UserError(f"{NAME} takes an even last dimension, values and gates; this one is of shape {list(x.shape)}")
    half = x.shape[-1] // 2
    shape = (*x.shape[:-1], half)
    out = x.new_empty(shape) if scales is None else to_float8.place(NAME, x, shape, scales)
    rows = x.numel() // max(1, 2 * half)
    if not (rows and half):
        return out
    if isinstance(scales, str):
        if half > LONGEST:
            raise UserError(f"{NAME} takes up to {LONGEST} numbers a row for a scale each, not {half}")
        wide = triton.next_power_of_2(half + 1) // 2
        rest = triton.next_power_of_2(half - wide) if half > wide else 0
        tall = max(1, min(4, 2048 // wide))
        launch.start(
            _geglu_rows,
            (triton.cdiv(rows, tall),),
            x, *out, rows, half, tall, wide, rest, num_warps=8 if tall * wide > 2048 else 4
        )
        return out
    values, scale = (out, x) if scales is None else out
    grid, tall, wide = launch.tiles(rows, half)
    launch.start(_geglu, grid, x, values, scale, rows, half, tall, wide, scales is not None, num_warps=4)
    return out


def reference(x, scales=None):
    """What `geglu` computes, by PyTorch, in the dtype of its argument."""
    value, gate = x.chunk(2, dim=-1)
    out = value * torch.nn.functional.gelu(gate)
    return out if scales is None else to_float8.reference(out, scales)


def bytes_moved(x: torch.Tensor, scales=None) -> int:
    """Bytes that must come and go: `x` and half as much again; in e4m3 a byte a number."""
    read, numbers = x.numel() * x.itemsize, x.numel() // 2
    return read + (numbers * x.itemsize if scales is None else numbers + x.numel() // x.shape[-1] * 4)


@triton.jit
def _gated(x, row, column, half, inside):
    at = row.to(tl.int64)[:, None] * 2 * half + column[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    gate = tl.load(x + at + half, inside, 0.0).to(tl.float32)
    return value * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))


@triton.jit
def _geglu(x, out, scale, rows, half, TALL: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < half)[None, :]
    y = _gated(x, row, column, half, inside)
    at = row.to(tl.int64)[:, None] * half + column[None, :]
    if SCALED:
        tl.store(out + at, in_e4m3(y, 0.0, scale, row, row < rows, False), inside)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def _geglu_rows(x, out, scale, rows, half, TALL: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.arange(0, WIDE)
    here = row < rows
    y = _gated(x, row, column, half, here[:, None])
    largest = tl.max(tl.abs(y), 1)
    at = row.to(tl.int64)[:, None] * half
    if REST:
        last = WIDE + tl.arange(0, REST)
        inside = here[:, None] & (last < half)[None, :]
        z = _gated(x, row, last, half, inside)
        largest = tl.maximum(largest, tl.max(tl.abs(z), 1))
        tl.store(out + at + last[None, :], in_e4m3(z, largest, scale, row, here, True), inside)
    tl.store(out + at + column[None, :], in_e4m3(y, largest, scale, row, here, True), here[:, None])
