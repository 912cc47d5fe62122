"""Group normalisation of an image in channels_last memory, with what comes before it and SiLU after it.

    v = x + shift[channel]                        (the convolution's bias and the time embedding, where there are some)
    y = (v - mean_g) / sqrt(var_g + eps) * weight[channel] + bias[channel],  mean and variance over a group's channels
    out = y * sigmoid(y)                          (SiLU, unless left out)

Bytes: x is read twice and `out` written once, 3 * numel * itemsize; with tensors larger than the GPU's cache nothing less
is possible, since the last number of a group changes the first (groups that a program can keep are read once). Operations:
about ten a number, so memory is the limit.

A group of few numbers (WHOLE) is one program's, which reads x once and keeps it: one kernel, and nothing to wait for between
several. Three kernels for the others, of which no program sees a whole group:
1. moments: each program takes a part of the positions and a strip of channels, and leaves the mean and the squared
   deviations of every channel in it, both summed around the part's first position: what is summed is as small as the
   deviations, and one reading is enough. `shift` is the same at all positions, so it moves a channel's mean and nothing
   else: it can wait.
2. fold: from the parts' moments a group's mean and variance, summed around one part's mean in the same way, and from
   these two numbers a channel: out = silu(x * scale + offset), with weight, bias, shift and statistics in them.
3. apply: reads x again, one multiplication and one addition, SiLU, and writes. It goes from the end to the start, since
   what was read last may still be in the GPU's cache.

What a convolution in e4m3 is to read (`conv_float8`) is written so, at no further pass: with zeros after each line and image. And
two images side by side, an image and its skip connection, are read from where each is: to write them as one first (`torch.cat`)
would be as much as another reading and writing of both.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch
from sdopt.kernels.to_float8 import Scaled, in_e4m3, place, with_borders
from sdopt.kernels.to_float8 import reference as rounded

NAME = "group_norm"
CHANNELS = 64  # of a strip: 128 bytes of bfloat16, a cache line
# Positions a tile, tiles a part, positions a tile of the last kernel (in e4m3 twice as many), and the programs from which on it
# is the fastest choice: tried on an H200 (132 multiprocessors) at the sizes of SDXL and SD 1.5.
TILES = ((32, 16, 64, 900), (32, 4, 64, 500), (32, 4, 32, 64), (16, 2, 32, 0))
WHOLE = 2**15  # numbers that one program keeps, each side of its tile rounded up to a power of two: 64 a thread at the most


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    scale: torch.Tensor | None = None,
    beside: torch.Tensor | None = None,
) -> torch.Tensor | Scaled:
    """Group normalisation, by default with SiLU after it; an image in channels_last, in and out.

    `x`: [batch, channels, height, width], float32, float16 or bfloat16, channels_last; `weight`, `bias`: [channels];
    `shift`: [channels] or [batch, channels], added to `x` first; its rows may be parts of longer ones. Sums in float32;
    the result has the dtype of `x`. With a `scale`, one float32 number, it is a `Scaled` image for `conv_float8`, values
    [batch, height + 1, width + 1, channels] of which the last line and column are zeros. `beside`: an image of the same batch,
    size and dtype, whose channels come after those of `x`; `channels` are then those of both.
    Raises UserError for other shapes, layouts, dtypes, or a number of groups that does not divide the channels.
    Source: https://arxiv.org/abs/1803.08494. Introduced in notebooks/11_fused_kernels.
    """
    launch.check_image(NAME, x)
    launch.check(NAME, x, weight=weight, bias=bias, shift=shift, beside=beside)
    batch, own, height, width = x.shape
    channels = own
    if beside is not None:
        launch.check_image(NAME, beside)
        if beside.dtype != x.dtype or beside[:, 0].shape != x[:, 0].shape:
            raise UserError(f"{NAME}: an image {list(x.shape)}, {x.dtype}, has beside it {list(beside.shape)}, {beside.dtype}")
        channels += beside.shape[1]
    rows = height * width
    if channels % groups:
        raise UserError(f"{NAME}: {groups} groups do not divide {channels} channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        launch.check_shape(NAME, name, tensor, (channels,))
    shared = shift is None or shift.ndim == 1
    launch.check_shape(NAME, "shift", shift, (channels,) if shared else (batch, channels), rows_apart=True)
    rounds = scale is not None
    out = (
        place(NAME, x, (batch, height + 1, width + 1, channels), scale, by_row=False)
        if rounds
        else x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    )
    values, of_all = out if rounds else (out, x)
    size = channels // groups
    wide, high = triton.next_power_of_2(size), triton.next_power_of_2(rows)
    arguments = weight, bias, x if shift is None else shift
    stride = 0 if shared else shift.stride(0)
    images = x, x if beside is None else beside, own
    if is_whole(x, groups, beside):
        launch.start(
            _whole,
            (groups, batch),
            *(*images, values, of_all, *arguments, rows, width, channels, stride, eps),
            *(size, high, wide, shift is not None, silu, triton.next_power_of_2(height + width + 1) if rounds else 0),
            beside is not None,
            num_warps=min(16, max(4, high * wide // 2**10)),
        )
        return out
    tall, turns, last = _part(batch, rows, channels)
    parts, strips = triton.cdiv(rows, tall * turns), triton.cdiv(channels, CHANNELS)
    moments = torch.empty(2, batch, parts, channels, device=x.device, dtype=torch.float32)
    lines = torch.empty(2, batch, channels, device=x.device, dtype=torch.float32)
    launch.start(
        _moments,
        (parts, strips, batch),
        *(*images, moments, moments[1], rows, channels, tall, turns, CHANNELS, beside is not None),
        num_warps=4,
    )
    launch.start(
        _fold,
        (groups, batch),
        *(moments, moments[1], lines, lines[1], *arguments),
        *(rows, channels, parts, tall * turns, stride, eps, size),
        *(max(16, 2048 // wide), wide, shift is not None),
        num_warps=8,
    )
    written, last = ((height + 1) * (width + 1), 2 * last) if rounds else (rows, last)
    launch.start(
        _apply,
        (triton.cdiv(written, last) * strips, batch),
        *(*images, values, of_all, lines, lines[1], rows, width, channels, last, CHANNELS, silu, rounds, beside is not None),
        num_warps=4,
    )
    return out


def reference(x, groups, weight, bias, eps=1e-5, shift=None, silu=True, scale=None, beside=None):
    """What `group_norm` computes, by PyTorch, in the dtype of its arguments."""
    if beside is not None:
        x = torch.cat((x, beside), 1)
    if shift is not None:
        x = x + shift.reshape(-1, x.shape[1], 1, 1)
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    y = torch.nn.functional.silu(y) if silu else y
    return y if scale is None else rounded(with_borders(y), scale)


def bytes_moved(x, groups, weight=None, bias=None, eps=1e-5, shift=None, silu=True, scale=None, beside=None) -> int:
    """Bytes that come and go at the least: two reads and a write, or one read where one program keeps a group."""
    numbers = x.numel() + (0 if beside is None else beside.numel())
    return (2 if is_whole(x, groups, beside) else 3) * numbers * x.itemsize


def is_whole(x: torch.Tensor, groups: int, beside: torch.Tensor | None = None) -> bool:
    """Whether one program keeps all numbers of a group."""
    size, rows = (x.shape[1] + (0 if beside is None else beside.shape[1])) // groups, x.shape[2] * x.shape[3]
    return triton.next_power_of_2(size) * triton.next_power_of_2(rows) <= WHOLE


def _part(batch, rows, channels):
    """(positions a tile, tiles a part, positions a tile of the last kernel): large, while there are programs enough."""
    programs = lambda positions: batch * triton.cdiv(rows, positions) * triton.cdiv(channels, CHANNELS)
    for tall, turns, last, enough in TILES:
        if programs(tall * turns) >= enough:
            return tall, turns, last


@triton.jit
def _read(x, beside, split, position, channel, channels, inside, PAIR: tl.constexpr):
    """Positions (of all images, counted on) by channels; of two images side by side the first has `split` channels."""
    if PAIR:  # each number comes from one of them, and a zero from the other
        mine = inside & (channel < split)[None, :]
        v = tl.load(x + position[:, None] * split + channel[None, :], mine, 0.0).to(tl.float32)
        theirs, number = inside & (channel >= split)[None, :], channel - split
        v += tl.load(beside + position[:, None] * (channels - split) + number[None, :], theirs, 0.0).to(tl.float32)
    else:
        v = tl.load(x + position[:, None] * channels + channel[None, :], inside, 0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["rows", "width", "shift_stride"])
def _whole(
    x, beside, split, out, of_all, weight, bias, shift, rows, width, channels, shift_stride, eps,
    SIZE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr, BORDER: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    k, position = tl.arange(0, WIDE), tl.arange(0, TALL)
    channel, own = tl.program_id(0) * SIZE + k, k < SIZE
    inside = (position < rows)[:, None] & own[None, :]
    of_all_images = batch.to(tl.int64) * rows + position
    v = _read(x, beside, split, of_all_images, channel, channels, inside, PAIR)
    if SHIFTED:
        v += tl.load(shift + batch * shift_stride + channel, own, 0.0).to(tl.float32)[None, :]
    count = rows * SIZE
    off = v - tl.sum(tl.sum(tl.where(inside, v, 0.0), 0), 0) / count
    variance = tl.sum(tl.sum(tl.where(inside, off * off, 0.0), 0), 0) / count
    scale = tl.load(weight + channel, own, 0.0).to(tl.float32) / tl.sqrt(variance + eps)
    y = off * scale[None, :] + tl.load(bias + channel, own, 0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    if BORDER:
        line, last = position // width, rows // width
        start = out + batch.to(tl.int64) * (last + 1) * (width + 1) * channels + channel[None, :]
        y = in_e4m3(y, 0.0, of_all, position, position < rows, False)
        tl.store(start + (position + line)[:, None] * channels, y, inside)
        n = tl.arange(0, BORDER)  # down the last column, then along the last line
        edge = tl.where(n <= last, n * (width + 1) + width, last * (width + 1) + n - last - 1)
        zeros = tl.zeros([BORDER, WIDE], tl.float32).to(out.dtype.element_ty)
        tl.store(start + edge[:, None] * channels, zeros, (n <= last + width)[:, None] & own[None, :])
    else:
        tl.store(out + of_all_images[:, None] * channels + channel[None, :], y.to(out.dtype.element_ty), inside)


@triton.jit
def _moments(
    x, beside, split, means, squares, rows, channels,
    TALL: tl.constexpr, TURNS: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = channel < channels
    start = batch.to(tl.int64) * rows
    top = part.to(tl.int64) * TALL * TURNS  # an image of many pixels has more numbers than 32 bits can count
    first = tl.sum(_read(x, beside, split, start + top + tl.arange(0, 1), channel, channels, real[None, :], PAIR), 0)
    total = tl.zeros([TALL, WIDE], tl.float32)
    squared = tl.zeros([TALL, WIDE], tl.float32)
    for turn in tl.static_range(TURNS):
        position = top + turn * TALL + tl.arange(0, TALL)
        inside = (position < rows)[:, None] & real[None, :]
        v = _read(x, beside, split, start + position, channel, channels, inside, PAIR)
        off = tl.where(inside, v - first[None, :], 0.0)
        total += off
        squared += off * off
    count = tl.minimum(TALL * TURNS, rows - top).to(tl.float32)
    moved = tl.sum(total, 0)
    at = (batch * tl.num_programs(0) + part) * channels + channel
    tl.store(means + at, first + moved / count, real)
    tl.store(squares + at, tl.sum(squared, 0) - moved * moved / count, real)


# Not one more compilation for every size of a picture: it looks at few numbers, PARTS at once, mostly all there are.
@triton.jit(do_not_specialize=["rows", "channels", "parts", "positions", "shift_stride", "size"])
def _fold(
    means, squares, scales, offsets, weight, bias, shift,
    rows, channels, parts, positions, shift_stride, eps, size,
    PARTS: tl.constexpr, SIZE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    k = tl.arange(0, SIZE)
    channel = tl.program_id(0) * size + k
    own = k < size
    moved = tl.zeros([SIZE], tl.float32)
    if SHIFTED:
        moved += tl.load(shift + batch * shift_stride + channel, own, 0.0).to(tl.float32)
    start = batch * parts * channels
    around = tl.load(means + start + tl.program_id(0) * size)
    total = tl.zeros([PARTS, SIZE], tl.float32)
    squared = tl.zeros([PARTS, SIZE], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & own[None, :]
        count = tl.minimum(positions, rows - part * positions).to(tl.float32)[:, None]
        at = start + part[:, None] * channels + channel[None, :]
        off = tl.load(means + at, here, 0.0) + moved[None, :] - around
        total += tl.where(here, count * off, 0.0)
        squared += tl.where(here, tl.load(squares + at, here, 0.0) + count * off * off, 0.0)
    all_of = rows * size
    apart = tl.sum(tl.sum(total, 0), 0) / all_of
    variance = tl.sum(tl.sum(squared, 0), 0) / all_of - apart * apart
    scale = tl.load(weight + channel, own, 0.0).to(tl.float32) / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    offset = tl.load(bias + channel, own, 0.0).to(tl.float32) + (moved - around - apart) * scale
    tl.store(scales + batch * channels + channel, scale, own)
    tl.store(offsets + batch * channels + channel, offset, own)


@triton.jit
def _apply(
    x, beside, split, out, of_all, scales, offsets, rows, width, channels,
    TALL: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, BORDERED: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    # from the end; and the strips of some positions after one another: together they are whole rows of memory
    n, strips = tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(channels, WIDE)
    tile, strip, batch = n // strips, n % strips, tl.num_programs(1) - 1 - tl.program_id(1)
    position, channel = tile * TALL + tl.arange(0, TALL), strip * WIDE + tl.arange(0, WIDE)
    real = channel < channels
    scale = tl.load(scales + batch * channels + channel, real, 0.0)
    offset = tl.load(offsets + batch * channels + channel, real, 0.0)
    count, own, here = rows, position, position < rows
    if BORDERED:
        line, place, last = position // (width + 1), position % (width + 1), rows // width
        count, own, here = (last + 1) * (width + 1), position - line, (line < last) & (place < width)
    inside = here[:, None] & real[None, :]
    at = (batch.to(tl.int64) * rows + own)[:, None] * channels + channel[None, :]
    y = _read(x, beside, split, batch.to(tl.int64) * rows + own, channel, channels, inside, PAIR)
    y = y * scale[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    if BORDERED:
        y = in_e4m3(tl.where(inside, y, 0.0), 0.0, of_all, position, here, False)
        at = (batch.to(tl.int64) * count + position)[:, None] * channels + channel[None, :]
        inside = (position < count)[:, None] & real[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
