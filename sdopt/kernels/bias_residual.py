"""A convolution's bias and the residual added in one pass, for an image in channels_last memory.

    out = x + bias[channel] + residual

Bytes: two reads and a write, 3 * numel * itemsize. A convolution that adds its bias itself and an addition after it move
five: the bias costs cuDNN a kernel of its own, which reads and writes the whole image.
"""

import torch
import triton
import triton.language as tl

from sdopt.kernels import launch

NAME = "bias_residual"


def bias_residual(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`x`, `residual`: [batch, channels, height, width], channels_last, of one dtype; `bias`: [channels].

    float32, float16 or bfloat16 in and out, added in float32. Raises UserError for other shapes, layouts or dtypes.
    Introduced in notebooks/11_fused_kernels.
    """
    for image in (x, residual):
        launch.check_image(NAME, image)
    launch.check(NAME, x, bias=bias, residual=residual)
    launch.check_shape(NAME, "residual", residual.permute(0, 2, 3, 1), tuple(x.permute(0, 2, 3, 1).shape))
    channels = x.shape[1]
    launch.check_shape(NAME, "bias", bias, (channels,))
    out = torch.empty_like(x)
    rows = x.numel() // channels
    grid, tall, wide = launch.tiles(rows, channels)
    launch.start(_bias_residual, grid, x, bias, residual, out, rows, channels, tall, wide, num_warps=4)
    return out


def reference(x, bias, residual):
    """What `bias_residual` computes, by PyTorch, in the dtype of its arguments."""
    return x + bias[:, None, None] + residual


def bytes_moved(x: torch.Tensor, *_) -> int:
    """Bytes that must come and go: two reads and a write."""
    return 3 * x.numel() * x.itemsize


@triton.jit
def _bias_residual(x, bias, residual, out, rows, channels, TALL: tl.constexpr, WIDE: tl.constexpr):
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = column < channels
    inside = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    y = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)
    y += tl.load(bias + column, real, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
