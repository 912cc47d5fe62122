"""Group normalisation of an image in channels_last memory, with what comes before it and SiLU after it.

    v = x + shift[channel]                        (the convolution's bias and the time embedding, where there are some)
    y = (v - mean_g) / sqrt(var_g + eps) * weight[channel] + bias[channel],  mean and variance over a group's channels
    out = y * sigmoid(y)                          (SiLU, unless left out)

Bytes: x is read twice and `out` written once, 3 * numel * itemsize; with tensors larger than the GPU's cache nothing less
is possible, since the last number of a group changes the first. Operations: about ten a number, so memory is the limit.

Three kernels, since no program sees a whole group:
1. moments: each program takes a tile of positions and channels, and leaves the mean and the squared deviations of every
   channel in it. `shift` is the same at all positions, so it moves a channel's mean and nothing else: it can wait.
2. fold: from the tiles' moments a group's mean and variance (Chan's formula, which never subtracts two large numbers),
   and from these two numbers a channel: out = silu(x * scale + offset), with weight, bias, shift and statistics in them.
3. apply: reads x again, one multiplication and one addition, SiLU, and writes.
"""

import torch
import triton
import triton.language as tl

from sdopt.kernels import launch
from sdopt.errors import UserError

NAME = "group_norm"
CHANNELS = 64  # of a tile: 128 bytes of bfloat16, a cache line


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """Group normalisation, by default with SiLU after it; an image in channels_last, in and out.

    `x`: [batch, channels, height, width], float32, float16 or bfloat16, channels_last; `weight`, `bias`: [channels];
    `shift`: [channels] or [batch, channels], added to `x` first. Sums in float32; the result has the dtype of `x`.
    Raises UserError for other shapes, layouts, dtypes, or a number of groups that does not divide the channels.
    Source: https://arxiv.org/abs/1803.08494.
    """
    launch.check_image(NAME, x)
    launch.check(NAME, x, weight=weight, bias=bias, shift=shift)
    batch, channels, height, width = x.shape
    rows = height * width
    if channels % groups:
        raise UserError(f"{NAME}: {groups} groups do not divide {channels} channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        launch.check_shape(NAME, name, tensor, (channels,))
    shared = shift is None or shift.ndim == 1
    launch.check_shape(NAME, "shift", shift, (channels,) if shared else (batch, channels))
    out = torch.empty_like(x)
    tall = _rows_a_tile(batch, rows, channels)
    tiles, strips = triton.cdiv(rows, tall), triton.cdiv(channels, CHANNELS)
    moments = torch.empty(2, batch, tiles, channels, device=x.device, dtype=torch.float32)
    lines = torch.empty(2, batch, channels, device=x.device, dtype=torch.float32)
    _moments[(tiles, strips, batch)](x, moments, moments[1], rows, channels, tall, CHANNELS, num_warps=4)
    size = channels // groups
    _fold[(groups, batch)](
        *(moments, moments[1], lines, lines[1], weight, bias, x if shift is None else shift),
        *(rows, channels, tiles, 0 if shared else channels, eps, size),
        *(tall, 16, triton.next_power_of_2(size), shift is not None),
        num_warps=4,
    )
    _apply[(tiles, strips, batch)](x, out, lines, lines[1], rows, channels, tall, CHANNELS, silu, num_warps=4)
    return out


def reference(x, groups, weight, bias, eps=1e-5, shift=None, silu=True):
    """What `group_norm` computes, by PyTorch, in the dtype of its arguments."""
    if shift is not None:
        x = x + shift.reshape(-1, x.shape[1], 1, 1)
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return torch.nn.functional.silu(y) if silu else y


def bytes_moved(x: torch.Tensor, *_) -> int:
    """Bytes that must come and go at the least: two reads and a write."""
    return 3 * x.numel() * x.itemsize


def _rows_a_tile(batch, rows, channels):
    """Positions a program takes: many, so that few moments are left to fold, but enough programs for every multiprocessor."""
    for tall in (128, 64, 32):
        if batch * triton.cdiv(rows, tall) * triton.cdiv(channels, CHANNELS) >= 512:
            return tall
    return 16


@triton.jit
def _moments(x, means, squares, rows, channels, TALL: tl.constexpr, WIDE: tl.constexpr):
    tile, batch = tl.program_id(0), tl.program_id(2)
    position, channel = tile * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (position < rows)[:, None] & (channel < channels)[None, :]
    start = x + batch.to(tl.int64) * rows * channels
    v = tl.load(start + position[:, None] * channels + channel[None, :], inside, 0.0).to(tl.float32)
    mean = tl.sum(v, 0) / tl.minimum(TALL, rows - tile * TALL)
    off = tl.where(inside, v - mean[None, :], 0.0)
    at = (batch * tl.num_programs(0) + tile) * channels + channel
    tl.store(means + at, mean, channel < channels)
    tl.store(squares + at, tl.sum(off * off, 0), channel < channels)


@triton.jit
def _fold(
    means, squares, scales, offsets, weight, bias, shift,
    rows, channels, tiles, shift_stride, eps, size,
    TALL: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    k = tl.arange(0, SIZE)
    channel = tl.program_id(0) * size + k
    own = k < size
    moved = tl.zeros([SIZE], tl.float32)
    if SHIFTED:
        moved += tl.load(shift + batch * shift_stride + channel, own, 0.0).to(tl.float32)
    start = batch * tiles * channels
    total = tl.zeros([TILES, SIZE], tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        here = (tile < tiles)[:, None] & own[None, :]
        count = tl.minimum(TALL, rows - tile * TALL).to(tl.float32)
        mean = tl.load(means + start + tile[:, None] * channels + channel[None, :], here, 0.0)
        total += tl.where(here, count[:, None] * (mean + moved[None, :]), 0.0)
    all_of = rows * size
    group = tl.sum(tl.sum(total, 0), 0) / all_of
    total = tl.zeros([TILES, SIZE], tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        here = (tile < tiles)[:, None] & own[None, :]
        count = tl.minimum(TALL, rows - tile * TALL).to(tl.float32)
        at = start + tile[:, None] * channels + channel[None, :]
        off = tl.load(means + at, here, 0.0) + moved[None, :] - group
        total += tl.where(here, tl.load(squares + at, here, 0.0) + count[:, None] * off * off, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(total, 0), 0) / all_of + eps)
    scale = tl.load(weight + channel, own, 0.0).to(tl.float32) * rstd
    offset = tl.load(bias + channel, own, 0.0).to(tl.float32) + (moved - group) * scale
    tl.store(scales + batch * channels + channel, scale, own)
    tl.store(offsets + batch * channels + channel, offset, own)


@triton.jit
def _apply(x, out, scales, offsets, rows, channels, TALL: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr):
    batch = tl.program_id(2)
    position, channel = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = channel < channels
    scale = tl.load(scales + batch * channels + channel, real, 0.0)
    offset = tl.load(offsets + batch * channels + channel, real, 0.0)
    inside = (position < rows)[:, None] & real[None, :]
    at = batch.to(tl.int64) * rows * channels + position[:, None] * channels + channel[None, :]
    y = tl.load(x + at, inside, 0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
