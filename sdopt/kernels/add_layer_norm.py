"""The residual added and the sum normalised, a row at a time: what stands between the layers of a transformer block.

    s = x + residual
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias,  over the last dimension

Both are wanted: y by the next layer, s as its residual. Bytes: two reads and two writes, 4 * numel * itemsize; in two
operations the sum would be read once more. A row fits into a program's registers, so it is read once; and its largest number
is known there, so y can be written in e4m3 (see `to_float8`), in half the bytes and at no further pass.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch, to_float8
from sdopt.kernels.to_float8 import Scaled, in_e4m3

NAME = "add_layer_norm"
LONGEST = 16384  # numbers of a row that a program can hold


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    scales: str | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Scaled]:
    """(x + residual, the layer norm of that sum); with `residual` None (x, its layer norm).

    `x`, `residual`: [..., channels], contiguous, float32, float16 or bfloat16; `weight`, `bias`: [channels]. The sum is
    rounded to the dtype of `x` before it is normalised, as two operations would; statistics in float32. With `scales`,
    "row" or one number for all, the norm comes in e4m3, as `to_float8` returns it.
    Raises UserError for other shapes, layouts or dtypes. Source: https://arxiv.org/abs/1607.06450. Introduced in
    notebooks/11_fused_kernels, `scales` in notebooks/13_fp8.
    """
    launch.check(NAME, x, residual=residual, weight=weight, bias=bias)
    launch.check_shape(NAME, "the input", x, tuple(x.shape))
    launch.check_shape(NAME, "residual", residual, tuple(x.shape))
    channels = x.shape[-1] if x.ndim else 0
    if not 0 < channels <= LONGEST:
        raise UserError(f"{NAME} takes 1 to {LONGEST} channels a row, not {channels}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        launch.check_shape(NAME, name, tensor, (channels,))
    added = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x) if scales is None else to_float8.place(NAME, x, tuple(x.shape), scales)
    values, scale = (y, x) if scales is None else y
    rows, wide = x.numel() // channels, triton.next_power_of_2(channels)
    tall = max(1, min(4, 4096 // wide))
    if rows:
        launch.start(
            _add_layer_norm,
            (triton.cdiv(rows, tall),),
            *(x, x if residual is None else residual, added, values, scale, weight, bias, rows, channels, eps),
            *(tall, wide, residual is not None, scales is not None, isinstance(scales, str)),
            num_warps=4 if wide * tall <= 4096 else 8,
        )
    return added, y


def reference(x, residual, weight, bias, eps=1e-5, scales=None):
    """What `add_layer_norm` computes, by PyTorch, in the dtype of its arguments."""
    added = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(added, added.shape[-1:], weight, bias, eps)
    return added, y if scales is None else to_float8.reference(y, scales)


def bytes_moved(x: torch.Tensor, residual: torch.Tensor | None, weight=None, bias=None, eps=1e-5, scales=None) -> int:
    """Bytes that must come and go: two reads and two writes, without a residual one and one; e4m3 takes a byte a number."""
    whole = x.numel() * x.itemsize
    written = whole if scales is None else to_float8.bytes_moved(x) - whole
    return (1 if residual is None else 3) * whole + written


@triton.jit
def _add_layer_norm(
    x, residual, added, out, scale, weight, bias, rows, channels, eps,
    TALL: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.arange(0, WIDE)
    real = column < channels
    inside = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    s = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        s += tl.load(residual + at, inside, 0.0).to(tl.float32)
        rounded = s.to(added.dtype.element_ty)
        tl.store(added + at, rounded, inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 1) / channels
    off = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(off * off, 1) / channels + eps)
    y = off * rstd[:, None] * tl.load(weight + column, real, 0.0).to(tl.float32)[None, :]
    y += tl.load(bias + column, real, 0.0).to(tl.float32)[None, :]
    if SCALED:
        tl.store(out + at, in_e4m3(y, tl.max(tl.abs(y), 1), scale, row, row < rows, OWN), inside)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), inside)
