"""A 3x3 convolution in e4m3 on tensor cores, as one product whose rows are an image's positions.

    out[b, y, x, n] = scale_x * scale_w[n] * sum over dy, dx, c of X[b, y + dy, x + dx, c] * W[n, dy, dx, c],  dy, dx in -1, 0, 1

Positions lie one after the other with a row and a column of zeros after each image: a step to a neighbour is then the same
number of positions everywhere, dy * (width + 1) + dx, for what is left of a line is the end of the line before, and what is
above an image the end of the image before. So the nine neighbours of a tile of positions are nine tiles of the same matrix,
shifted, and the convolution is a product of [positions, 9 * channels] by [9 * channels, outputs] that is never written out.

Operations: 2 * 9 * positions * channels * outputs, plus those for the zeros (6 % of an image of 32 lines, 2 % of one of 128).
A program computes several tiles where there are more than multiprocessors, as `linear_geglu`'s do: while one is written, the next
one's numbers are on their way.
One scale for the whole input: a position is summed with its neighbours, which a scale of its own would not survive.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sdopt.errors import UserError
from sdopt.kernels import launch
from sdopt.kernels.to_float8 import E4M3, Scaled, to_float8, with_borders

NAME = "conv_float8"
# Positions and outputs of a tile, channels at a step, warps, steps that are loaded ahead: how long such a tile takes, relative
# to the others. Measured on an H200 at the sizes of SDXL's and SD 1.5's convolutions, with six tiles more to choose from: which
# of these three `tile` takes was the fastest of the nine or within 5 % of it at each.
TILES = {(256, 128, 128, 8, 4): 16, (128, 128, 128, 4, 4): 9, (64, 128, 128, 4, 5): 6}
FEWEST = 3  # steps ahead that there must be room for


def conv_float8(x: Scaled, weight: Scaled, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """`x`: `bordered`'s, values [batch, height + 1, width + 1, channels]; `weight`: `rounded`'s, values [outputs, 9 * channels].

    Returns [batch, outputs, height, width] of `dtype` in channels_last memory, without a bias; summed by tensor cores as
    torch._scaled_mm does with `use_fast_accum`. Raises UserError for other shapes, layouts or dtypes, and for channels that are
    no multiple of 16.
    """
    launch.check_shape(NAME, "the input", x.values, tuple(x.values.shape))
    batch, high, wide, channels = x.values.shape if x.values.ndim == 4 else (0, 0, 0, 0)
    outputs = weight.values.shape[0]
    launch.check_shape(NAME, "weight", weight.values, (outputs, 9 * channels))
    launch.check_shape(NAME, "the scale of weight", weight.scale, (outputs, 1))
    launch.check_shape(NAME, "the input's scale", x.scale, ())
    launch.check(NAME, x.scale, **{"the input": x.values, "weight": weight.values, "the scale of weight": weight.scale})
    if not x.values.dtype == weight.values.dtype == E4M3:
        raise UserError(f"{NAME}: the input is of {x.values.dtype}, the weights of {weight.values.dtype}: round both to e4m3")
    if not channels or channels % launch.ALIGNED:
        raise UserError(f"{NAME}: {channels} channels are no multiple of {launch.ALIGNED}")
    shape = batch, outputs, high - 1, wide - 1
    out = torch.empty(shape, dtype=dtype, device=x.values.device, memory_format=torch.channels_last)
    rows = batch * high * wide
    if not rows:
        return out
    programs = launch.multiprocessors(x.values)
    tall, across, deep, warps, stages, several = tile(rows, outputs, programs, launch.memory(x.values))
    count = triton.cdiv(rows, tall) * triton.cdiv(outputs, across)
    tiles = TensorDescriptor.from_tensor
    launch.start(
        _conv,
        (min(count, programs) if several else count,),
        *(tiles(x.values.view(rows, channels), [tall, deep]), tiles(weight.values, [across, deep])),
        *(out, x.scale, weight.scale, rows, high, wide, channels, outputs, tall, across, deep, several, launch.INTERPRETED),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def tile(rows: int, outputs: int, multiprocessors: int, memory: int) -> tuple[int, ...]:
    """Which of TILES has so many positions and outputs computed first, and whether a program computes several of them.

    A multiprocessor has one tile at a time, so it takes as many turns as there are tiles for each, a begun one being whole. No
    more steps are loaded ahead than `memory` holds, beside the tile that is written meanwhile where there are several.
    """
    turns = lambda tile: triton.cdiv(triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]), multiprocessors)
    best = min(TILES, key=lambda tile: turns(tile) * TILES[tile])
    tall, across, deep, warps, stages = best
    step, written = (tall + across) * deep, 2 * tall * across
    several = turns(best) > 1 and memory >= written + FEWEST * step
    return tall, across, deep, warps, min(stages, (memory - written * several) // step), several


def bordered(x: torch.Tensor, scale: torch.Tensor) -> Scaled:
    """An image [batch, channels, height, width] in e4m3 with one `scale`, in three passes; `group_norm` writes it in none."""
    return to_float8(with_borders(x), scale)


def rounded(weight: torch.Tensor) -> Scaled:
    """The weights of a 3x3 convolution, [outputs, channels, 3, 3], in e4m3 with a scale an output."""
    return to_float8(flat(weight))


def flat(weight: torch.Tensor) -> torch.Tensor:
    """The weights of a 3x3 convolution, [outputs, channels, 3, 3], an output a row: [outputs, 9 * channels]."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def reference(x, weight):
    """What `conv_float8` computes, by PyTorch, in float64."""
    image = (x.values.double() * x.scale).permute(0, 3, 1, 2)[:, :, :-1, :-1]
    kernel = (weight.values.double() * weight.scale).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(image, kernel, padding=1)


@triton.jit
def _conv(
    x, weight, out, x_scale, scales, rows, high, wide, channels, outputs,
    TALL: tl.constexpr, ACROSS: tl.constexpr, DEEP: tl.constexpr, SEVERAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outputs, ACROSS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, TALL) * across, tl.num_programs(0), flatten=SEVERAL):
        row, column = tile // across * TALL, tile % across * ACROSS
        sums = tl.zeros([TALL, ACROSS], tl.float32)
        # the nine neighbours of some channels one after the other: they are mostly the same numbers, still in the GPU's cache
        for step in range(9 * tl.cdiv(channels, DEEP)):
            first, neighbour = step // 9 * DEEP, step % 9
            away = (neighbour // 3 - 1) * wide + neighbour % 3 - 1
            # before the first position and beyond the last there are zeros; channels beyond the last are zeros of x
            some, weights = x.load([row + away, first]), weight.load([column, neighbour * channels + first])
            if EXACT:  # the interpreter takes e4m3 for integers
                some, weights = some.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(some, weights.T, sums)
        position, output = row + tl.arange(0, TALL), column + tl.arange(0, ACROSS)
        real = output < outputs
        sums *= (tl.load(x_scale) * tl.load(scales + output, real, 0.0))[None, :]
        image, line, place = position // (high * wide), position // wide % high, position % wide
        inside = (position < rows) & (line < high - 1) & (place < wide - 1)
        at = ((image * (high - 1) + line) * (wide - 1) + place).to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), inside[:, None] & real[None, :])
