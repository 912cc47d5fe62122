"""Numbers rounded to e4m3, the 8-bit float for tensor cores: 1 sign, 4 exponent and 3 mantissa bits, up to 448.

    scale = max(|x|) / 448 over a row,   values = round(x / scale),   x is about values * scale

The step between neighbours is 1/8 of a power of two, so rounding is off by at most 1/16 of a number; below 448 / 2**15 of a
row's largest, where powers of two end, by at most 2**-10 of `scale`. One large number therefore costs its own row's small
ones, and no other row anything. A row of zeros keeps a scale above 0. With a scale given for all rows, what lies beyond it
saturates. NaN stays NaN on a GPU; Triton's interpreter makes a number of it. Bytes: two or four a number read, one written, and
four a row. Needs compute capability 8.9 or later.

`in_e4m3` is for other kernels: those that hold a row in their registers write it in e4m3 at no further pass.
"""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch

NAME = "to_float8"
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
TINIEST = 2.0**-100  # a row's largest number counts as no less: the scale of a row of zeros has an inverse, too
LONGEST = 32768  # numbers of a row that a program can hold
CAPABILITY = (8, 9)
INTERPRETED = tl.constexpr(launch.INTERPRETED)


class Scaled(NamedTuple):
    """Numbers in e4m3, and the float32 scales that make them what they were: `values * scale`.

    `values`: [..., n]; `scale`: [rows, 1], one a row, or [], one for all.
    """

    values: torch.Tensor
    scale: torch.Tensor


def to_float8(x: torch.Tensor, scales: str | torch.Tensor = "row", out: Scaled | None = None) -> Scaled:
    """`x`: [..., n], contiguous, float32, float16 or bfloat16; `scales`: "row", or one float32 number, [], for all.

    `out`: where it is written, None: to new tensors. Raises UserError for other shapes, layouts or dtypes, or a GPU that
    has no e4m3. Source: https://arxiv.org/abs/2209.05433. Introduced in notebooks/13_fp8.
    """
    launch.check(NAME, x)
    launch.check_shape(NAME, "the input", x, tuple(x.shape))
    wide = x.shape[-1] if x.ndim else 0
    if not 0 < wide <= LONGEST:
        raise UserError(f"{NAME} takes 1 to {LONGEST} numbers a row, not {wide}")
    out = place(NAME, x, tuple(x.shape), scales) if out is None else out
    rows, size = x.numel() // wide, triton.next_power_of_2(wide)
    tall = max(1, min(4, 4096 // size))
    if rows:
        launch.start(
            _to_float8,
            (triton.cdiv(rows, tall),),
            *(x, *out, rows, wide, tall, size, isinstance(scales, str)),
            num_warps=4 if size * tall <= 4096 else 8 if size <= 16384 else 16,
        )
    return out


def reference(x, scales="row"):
    """What `to_float8` computes, by PyTorch."""
    wide = x if x.dtype is torch.float64 else x.float()
    scale = scales
    if isinstance(scales, str):
        scale = wide.reshape(-1, x.shape[-1]).abs().amax(1, keepdim=True).clamp(min=TINIEST) / LARGEST
        wide = wide / scale.reshape(*x.shape[:-1], 1)
    else:
        wide = wide / scale
    return Scaled(wide.clamp(-LARGEST, LARGEST).to(E4M3), scale.float())


def with_borders(x: torch.Tensor) -> torch.Tensor:
    """An image [batch, channels, height, width] as `conv_float8` reads it: [batch, height + 1, width + 1, channels], zeros last."""
    return torch.nn.functional.pad(x, (0, 1, 0, 1)).permute(0, 2, 3, 1).contiguous()


def bytes_moved(x: torch.Tensor, *_) -> int:
    """Bytes that must come and go: `x`, one a number, and a scale a row."""
    return x.numel() * (x.itemsize + 1) + x.numel() // x.shape[-1] * 4


def place(kernel: str, x: torch.Tensor, shape: tuple[int, ...], scales: str | torch.Tensor, by_row: bool = True) -> Scaled:
    """Room for what `kernel` makes of `x` in e4m3: values of `shape`, and scales as to `to_float8`.

    `by_row`: whether it finds scales a row, which takes a program that sees a whole one. Raises UserError for other scales, or
    where the GPU has no e4m3.
    """
    if x.is_cuda and (found := torch.cuda.get_device_capability(x.device)) < CAPABILITY:
        raise UserError(f"{kernel}: e4m3 needs compute capability 8.9 or later, this GPU has {found[0]}.{found[1]}")
    if isinstance(scales, torch.Tensor):
        launch.check(kernel, x, scales=scales)
        if scales.dtype is not torch.float32 or scales.numel() != 1:
            raise UserError(f"{kernel}: a scale for all rows is one float32 number: make it a tensor of that")
    elif not by_row:
        raise UserError(f"{kernel} finds no scales of its own, as {scales!r} asks: give it one number in a tensor, for all rows")
    elif scales == "row":
        scales = torch.empty(prod(shape[:-1]), 1, device=x.device, dtype=torch.float32)
    else:
        raise UserError(f"{kernel}: unknown scales {scales!r}: use 'row' or a tensor of one number")
    return Scaled(torch.empty(shape, device=x.device, dtype=E4M3), scales)


@triton.jit
def in_e4m3(y, largest, scale, row, here, OWN: tl.constexpr):
    """A tile of rows `y` in e4m3: with OWN scales from each row's `largest` absolute number, stored; else by the one given."""
    if OWN:
        largest = tl.maximum(largest, 7.888609052210118e-31)  # TINIEST
        tl.store(scale + row, largest / 448.0, here)
        y = y * (448.0 / largest)[:, None]
    else:
        y = y * (1.0 / tl.load(scale))
    y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:  # the interpreter rounds a mantissa without its carry: it gets numbers that need no more rounding
        bits = y.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        y = tl.where(tl.abs(y) < 0.015625, (y + 24576.0) - 24576.0, normal)
    return y.to(tl.float8e4nv)


@triton.jit
def _to_float8(x, out, scale, rows, wide, TALL: tl.constexpr, WIDE: tl.constexpr, OWN: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < wide)[None, :]
    at = row.to(tl.int64)[:, None] * wide + column[None, :]
    y = tl.load(x + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, in_e4m3(y, tl.max(tl.abs(y), 1), scale, row, row < rows, OWN), inside)
