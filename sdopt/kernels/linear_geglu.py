"""A linear layer and the GEGLU after it as one kernel: the first half of a transformer's feed-forward layer.

    [value, gate] = x @ weight.T + bias,   out = value * gelu(gate),   gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))

Operations: 4 * rows * inputs * n, on tensor cores. In two kernels the product writes 2n numbers a row and GEGLU reads them
again: these 4 * rows * n * itemsize bytes never leave the multiprocessor here, since a program computes a tile of values and
the same tile of gates, side by side as one product of a tile of x, and gates while both are in its registers. The weights are
fetched as what they are, two matrices [n, inputs] one after the other: a tile is the same rows of both. Bytes that stay: x, the
weights, the result. It pays where a product written in Triton loses less against a library's than those bytes cost.

A program computes several large tiles, as many programs as there are multiprocessors. Its two loops, over tiles and over steps
of a tile, are one to the compiler (`flatten`): while one tile is gated and written, the next one's numbers are on their way.

In e4m3 a product takes half the time, and those bytes are the larger part. The result is written in e4m3, too, where its scale
is known before: a row's own is known to no program, since none sees a whole row.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sdopt.errors import UserError
from sdopt.kernels import launch
from sdopt.kernels.to_float8 import E4M3, Scaled, in_e4m3, place

NAME = "linear_geglu"
# Rows and outputs of a tile, inputs at a step, warps, steps that are loaded ahead. A tensor core's widest product has 256
# columns: 128 values and their gates.
TILE, NARROW, FEW_ROWS = (128, 128, 64, 8, 3), (128, 64, 64, 4, 5), (64, 64, 64, 4, 4)
OF_BYTES, NARROW_OF_BYTES = (128, 128, 128, 8, 3), (128, 64, 128, 8, 4)
GAINS = 1.15  # times as many multiprocessors at work with a narrow tile make up for reading more
TOGETHER = 8  # tiles of rows that are computed at about the same time, and share weights in the GPU's cache
ENOUGH = 1024  # rows: with fewer, large tiles would leave multiprocessors idle


def linear_geglu(
    x: torch.Tensor | Scaled, weight: torch.Tensor | Scaled, bias: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor | Scaled:
    """`x`: [..., inputs]; `weight`: [2n, inputs], values first; `bias`: [2n]; all contiguous, of one dtype; returns [..., n].

    float32, float16 or bfloat16; summed and gated in float32, rounded once. `x` and `weight` may be in e4m3, both with scales a
    row or both with one for all, and the result is of the dtype of `bias`; with a `scale`, one float32 number, it is in e4m3
    by that. Raises UserError for other shapes, layouts or dtypes, and for rows of x, or of the result, that are not a multiple of
    16 bytes. Source: https://arxiv.org/abs/2002.05202.
    """
    (x, of_x), (weight, of_weight) = (part if isinstance(part, Scaled) else (part, None) for part in (x, weight))
    launch.check(NAME, bias, weight=weight, **{"the input": x})
    launch.check_shape(NAME, "the input", x, tuple(x.shape))
    inputs, outputs = x.shape[-1] if x.ndim else 0, weight.shape[0] // 2
    launch.check_shape(NAME, "weight", weight, (2 * outputs, inputs))
    launch.check_shape(NAME, "bias", bias, (2 * outputs,))
    rounded = of_x is not None
    if not x.dtype == weight.dtype == (E4M3 if rounded else bias.dtype):
        raise UserError(f"{NAME}: x, weight and bias are of {x.dtype}, {weight.dtype} and {bias.dtype}: make them one")
    shape, rows = (*x.shape[:-1], outputs), x.numel() // max(1, inputs)
    if rounded:
        by_row = of_x.ndim > 0
        launch.check_shape(NAME, "the scale of x", of_x, (rows, 1) if by_row else ())
        launch.check_shape(NAME, "the scale of weight", of_weight, (2 * outputs, 1) if by_row else ())
    out = bias.new_empty(shape) if scale is None else place(NAME, bias, shape, scale, by_row=False).values
    if any(n % launch.ALIGNED for n in (inputs * x.itemsize, outputs * out.itemsize, x.data_ptr(), weight.data_ptr())):
        raise UserError(f"{NAME}: rows of {inputs} inputs and {outputs} outputs do not begin at multiples of 16 bytes")
    result = out if scale is None else Scaled(out, scale)
    if not out.numel():
        return result
    programs = launch.multiprocessors(x)
    tall, wide, deep, warps, stages = tile_of(rows, outputs, x.dtype, out.dtype, launch.memory(x), programs)
    tiles = TensorDescriptor.from_tensor
    halves, gated = weight.view(2, outputs, inputs), out.view(rows, outputs)
    count = triton.cdiv(rows, tall) * triton.cdiv(outputs, wide)
    several = tall == TILE[0]  # tiles a program
    launch.start(
        _linear_geglu,
        (min(count, programs) if several else count,),
        *(tiles(x.view(rows, inputs), [tall, deep]), tiles(halves, [2, wide, deep]), bias, tiles(gated, [tall, wide])),
        *(bias if s is None else s for s in (of_x, of_weight, scale)),
        *(rows, outputs, inputs, tall, wide, deep, TOGETHER, launch.INTERPRETED or x.dtype is torch.float32),
        *(("row" if by_row else "all") if rounded else "", scale is not None),
        num_warps=warps,
        num_stages=stages,
    )
    return result


def tile_of(rows: int, outputs: int, dtype: torch.dtype, out: torch.dtype, memory: int, programs: int) -> tuple[int, ...]:
    """The tile for so many `rows` of `dtype`, with no more steps loaded ahead than `memory` bytes hold beside a tile of `out`.

    `programs` at once: a narrow tile where the large ones would leave many of them idle in the last round.
    """
    tile, narrow = (OF_BYTES, NARROW_OF_BYTES) if dtype is E4M3 else (TILE, NARROW)
    if _few(rows, dtype):
        tile = FEW_ROWS
    elif _at_work(rows, outputs, narrow, programs) >= GAINS * _at_work(rows, outputs, tile, programs):
        tile = narrow
    tall, wide, deep, warps, stages = tile
    if dtype is torch.float32:  # twice the bytes, and a multiprocessor's own memory is not larger
        deep //= 2
    held = (memory - tall * wide * out.itemsize) // ((tall + 2 * wide) * deep * dtype.itemsize)
    return tall, wide, deep, warps, max(1, min(stages, held))


def _at_work(rows, outputs, tile, programs):
    """The share of the programs' rounds in which they have a tile."""
    count = triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1])
    return count / (triton.cdiv(count, programs) * programs)


def _few(rows, dtype):
    return dtype is not E4M3 and (rows < ENOUGH or dtype is torch.float32)


def suits(rows: int, device: torch.device) -> bool:
    """Whether it is made for so many rows, and for the GPU."""
    return rows >= ENOUGH and launch.fetches_tiles(device)


def fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether it takes these, in 16 bits, and is made for them."""
    return (
        suits(x.numel() // x.shape[-1], x.device)
        and bias is not None
        and x.dtype == weight.dtype == bias.dtype
        and x.itemsize == 2
        and x.is_contiguous()
        and weight.is_contiguous()
        and not any(n * x.itemsize % launch.ALIGNED for n in (x.shape[-1], len(weight) // 2))
        and not any(part.data_ptr() % launch.ALIGNED for part in (x, weight))
    )


def reference(x, weight, bias):
    """What `linear_geglu` computes, by PyTorch, in the dtype of its arguments."""
    value, gate = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def bytes_moved(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    """Bytes that must come and go: x, the weights and the result."""
    result = x.numel() // x.shape[-1] * weight.shape[0] // 2
    return (x.numel() + weight.numel() + result) * x.itemsize


@triton.jit
def _gelu(z):
    """z / 2 * (1 + erf(z / sqrt(2))), up to 7e-6 of it or 6e-7: float16 rounds off thirty times that. Fewer operations than erf's.

    What is below -z of a normal distribution is a power of two of a polynomial of z: fitted here (least largest error) for z up
    to 6, and falling on from there.
    """
    size = tl.abs(z)
    power = 6.159829354146495e-05 - 1.8348113144384115e-06 * size
    power = power * size - 0.0009305248386226594
    power = power * size + 0.00850789062678814
    power = power * size - 0.05396007001399994
    power = power * size - 0.4584643840789795
    power = power * size - 1.1512510776519775
    tail = tl.exp2(power * size - 0.9999952912330627)
    return z * tl.where(z < 0, tail, 1 - tail)


@triton.jit
def _put(
    both, out, bias, of_x, of_weight, of_out, row, column, rows, outputs,
    TALL: tl.constexpr, WIDE: tl.constexpr, ROUNDED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    values, gates = both.reshape(TALL, 2, WIDE).permute(0, 2, 1).split()
    at, line = column + tl.arange(0, WIDE), row + tl.arange(0, TALL)
    if ROUNDED == "row":
        of_line = tl.load(of_x + line, line < rows, 0.0)[:, None]
        values *= of_line * tl.load(of_weight + at, at < outputs, 0.0)[None, :]
        gates *= of_line * tl.load(of_weight + outputs + at, at < outputs, 0.0)[None, :]
    elif ROUNDED == "all":
        values *= tl.load(of_x) * tl.load(of_weight)
        gates *= tl.load(of_x) * tl.load(of_weight)
    values += tl.load(bias + at, at < outputs, 0.0).to(tl.float32)[None, :]
    gates += tl.load(bias + outputs + at, at < outputs, 0.0).to(tl.float32)[None, :]
    if bias.dtype.element_ty == tl.float32:
        gated = values * (0.5 * gates * (1 + tl.erf(gates * 0.7071067811865476)))
    else:  # the tensor cores wait for it
        gated = values * _gelu(gates)
    if ROUNDS:
        gated = in_e4m3(gated, 0.0, of_out, line, line < rows, False)
    out.store([row, column], gated.to(out.dtype))


@triton.jit
def _linear_geglu(
    x, weight, bias, out, of_x, of_weight, of_out, rows, outputs, inputs,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, TOGETHER: tl.constexpr, EXACT: tl.constexpr,
    ROUNDED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    # what is computed at the same time shares rows of x and weights: TOGETHER tiles of rows by as many of outputs
    down, across = tl.cdiv(rows, TALL), tl.cdiv(outputs, WIDE)
    band = TOGETHER * across
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile // band * TOGETHER
        high = tl.minimum(down - first, TOGETHER)
        row = (first + tile % band % high) * TALL
        column = tile % band // high * WIDE
        both = tl.zeros([TALL, 2 * WIDE], tl.float32)
        for k in range(0, inputs, DEEP):
            some, of_both = x.load([row, k]), weight.load([0, column, k]).reshape(2 * WIDE, DEEP)
            if EXACT:  # float32 without TF32; and the interpreter takes narrower floats for integers
                some, of_both = some.to(tl.float32), of_both.to(tl.float32)
            both = tl.dot(some, of_both.T, both, input_precision="ieee")
        _put(both, out, bias, of_x, of_weight, of_out, row, column, rows, outputs, TALL, WIDE, ROUNDED, ROUNDS)
