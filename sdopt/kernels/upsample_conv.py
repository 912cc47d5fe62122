"""An image doubled (each pixel to four equal ones) and convolved 3x3, without ever making the doubled image.

    out = conv3x3(nearest(x), weight) + bias

Under a 3x3 window of the doubled image lie only 2x2 different pixels of x, and which of the nine weights meet on one of them
depends on whether the row and the column are even or odd. So there are four 2x2 convolutions of x, one for each of these
cases, with sums of weights (`folded`); they are done as one, with four times the channels. A kernel puts their outputs in
their places and adds the bias.

Operations: 4/9 of what the 3x3 convolution takes. Bytes: the four outputs are written, read and written in place; the doubled
image, which would be written and read, is saved, and so is the pass that adds the bias.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import conv2d, interpolate

from sdopt.errors import UserError
from sdopt.kernels import launch

NAME = "upsample_conv"


def upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, quarters: torch.Tensor | None = None
) -> torch.Tensor:
    """`x`: [batch, inputs, height, width], channels_last; `weight`: [outputs, inputs, 3, 3]; `bias`: [outputs].

    float32, float16 or bfloat16; returns [batch, outputs, 2 height, 2 width], channels_last. `quarters`: what
    `folded(weight)` returned, for who keeps it. Raises UserError for other shapes, layouts or dtypes. Introduced in
    notebooks/11_fused_kernels.
    """
    launch.check_image(NAME, x)
    launch.check(NAME, x, weight=weight, bias=bias)
    outputs = weight.shape[0]
    if weight.shape[1:] != (x.shape[1], 3, 3):
        raise UserError(f"{NAME}: weight has shape {list(weight.shape)}, [outputs, {x.shape[1]}, 3, 3] was expected")
    launch.check_shape(NAME, "bias", bias, (outputs,))
    quarters = folded(weight) if quarters is None else quarters
    cases = conv2d(x, quarters, padding=1).contiguous(memory_format=torch.channels_last)
    batch, _, height, width = x.shape
    shape = (batch, outputs, 2 * height, 2 * width)
    out = torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    rows = out.numel() // outputs
    grid, tall, wide = launch.tiles(rows, outputs)
    launch.start(_interleave, grid, cases, bias, out, rows, 2 * height, 2 * width, outputs, tall, wide, num_warps=4)
    return out


def folded(weight: torch.Tensor) -> torch.Tensor:
    """The four 2x2 convolutions that stand for a 3x3 one of the doubled image: [4 * outputs, inputs, 2, 2].

    In the order even row and column, even row and odd column, odd and even, odd and odd; summed in float32.
    """
    cases = [case for rows in _met(weight.float(), 2) for case in _met(rows, 3)]
    return torch.cat(cases).to(weight.dtype, memory_format=torch.channels_last)


def _met(weights, dim):
    """Three weights as they meet on two pixels, along `dim`: at an even place of the doubled image, and at an odd one."""
    first, middle, last = weights.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def reference(x, weight, bias, quarters=None):
    """What `upsample_conv` computes, by PyTorch, in the dtype of its arguments."""
    return conv2d(interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def bytes_moved(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    """Bytes that must come and go, were computing free: the image, the weights and an image four times as large."""
    return (x.numel() + weight.numel() + 4 * x.numel() // x.shape[1] * weight.shape[0]) * x.itemsize


@triton.jit
def _interleave(cases, bias, out, rows, height, width, channels, TALL: tl.constexpr, WIDE: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = column < channels
    inside = (row < rows)[:, None] & real[None, :]
    x, y, image = row % width, row // width % height, row // (width * height)
    # the 2x2 window's place: padded by one pixel, the small image has a place more a side
    place = (image * (height // 2 + 1) + (y + 1) // 2) * (width // 2 + 1) + (x + 1) // 2
    at = (place.to(tl.int64) * 4 + y % 2 * 2 + x % 2)[:, None] * channels + column[None, :]
    value = tl.load(cases + at, inside, 0.0).to(tl.float32) + tl.load(bias + column, real, 0.0).to(tl.float32)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * channels + column[None, :], value.to(out.dtype.element_ty), inside)
