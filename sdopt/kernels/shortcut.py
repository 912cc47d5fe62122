"""A residual block's shortcut, a 1x1 convolution of an image or of two side by side, and the block's end, in one kernel.

    out = residual + bias[output] + [x, beside] @ weight.T        (at each position; `beside`: a skip connection's image)

Operations: 2 * positions * channels * outputs, on tensor cores. Bytes that stay: both images, the residual and the result. In
three kernels two images are first written as one, which is read again, and the product is written and read again: at the sizes of a
UNet's last blocks, of few channels and many positions, that is more than the kernel itself moves. Summed in float32 and rounded
once: a program sees the rows of both images, one after the other, and adds what remains while the sum is in its registers.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sdopt.errors import UserError
from sdopt.kernels import launch

NAME = "shortcut"
# Positions and outputs of a tile, channels at a step, warps, steps loaded ahead: in 16 bits (Stable Diffusion's 320 outputs are five
# times 64; the fastest of six tried on an H200), and in float32.
TILE, EXACT = (128, 64, 64, 8, 3), (64, 64, 32, 4, 2)


def shortcut(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """`x`, `beside`: [batch, channels, height, width], their channels one after the other; `residual`: the same with outputs.

    All in channels_last and of one dtype, float32, float16 or bfloat16, as `weight`: [outputs, channels of both], contiguous;
    `bias`: [outputs]. Returns an image like `residual`. Raises UserError for other shapes, layouts or dtypes, and for channels
    that are not a multiple of 16 bytes. Introduced in notebooks/11_fused_kernels.
    """
    images = [image for image in (x, beside) if image is not None]
    for image in (*images, residual):
        launch.check_image(NAME, image)
    launch.check(NAME, x, weight=weight, bias=bias, residual=residual, beside=beside)
    outputs, sizes = residual.shape[1], [image.shape[1] for image in images]
    launch.check_shape(NAME, "weight", weight, (outputs, sum(sizes)))
    launch.check_shape(NAME, "bias", bias, (outputs,))
    if any(image[:, 0].shape != residual[:, 0].shape for image in images):
        raise UserError(f"{NAME}: images {[list(i.shape) for i in images]} do not fit a residual {list(residual.shape)}")
    if any(part.dtype != x.dtype for part in (*images, weight, residual)):
        raise UserError(f"{NAME}: images, weight and residual are of several dtypes: make them one")
    if not _aligned(*images, residual):
        raise UserError(f"{NAME}: rows of {' and '.join(map(str, (*sizes, outputs)))} channels do not begin at multiples of 16 bytes")
    out = torch.empty_like(residual)
    rows = residual.numel() // outputs
    if not rows:
        return out
    tall, wide, deep, warps, stages = EXACT if x.dtype is torch.float32 else TILE
    tiles = lambda image, across: TensorDescriptor.from_tensor(image.permute(0, 2, 3, 1).reshape(rows, -1), [tall, across])
    launch.start(
        _shortcut,
        (triton.cdiv(rows, tall) * triton.cdiv(outputs, wide),),
        *(tiles(images[0], deep), tiles(images[-1], deep), TensorDescriptor.from_tensor(weight, [wide, deep]), bias),
        *(tiles(residual, wide), tiles(out, wide)),
        *(outputs, sizes[0], sizes[-1], tall, wide, deep, launch.INTERPRETED or x.dtype is torch.float32),
        len(images) > 1,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def fits(weight: torch.Tensor, *images: torch.Tensor) -> bool:
    """Whether it takes these, in 16 bits or interpreted, and is made for the GPU."""
    return (
        launch.fetches_tiles(weight.device)
        and (weight.itemsize == 2 or launch.INTERPRETED)
        and all(image.dtype == weight.dtype for image in images)
        and _aligned(*images)
        and not (weight.data_ptr() % launch.ALIGNED or len(weight) * weight.itemsize % launch.ALIGNED)
    )


def _aligned(*images):
    """Whether each position's channels begin at a multiple of 16 bytes."""
    return not any(n % launch.ALIGNED for image in images for n in (image.data_ptr(), image.shape[1] * image.itemsize))


def reference(x, weight, bias, residual, beside=None):
    """What `shortcut` computes, by PyTorch, in the dtype of its arguments."""
    both = x if beside is None else torch.cat((x, beside), 1)
    return torch.nn.functional.conv2d(both, weight[:, :, None, None], bias) + residual


def bytes_moved(x, weight, bias, residual, beside=None) -> int:
    """Bytes that must come and go: the images, the weights, the residual, and a result of its size."""
    parts = (x, weight, residual, residual, *([] if beside is None else [beside]))
    return sum(part.numel() * part.itemsize for part in parts)


@triton.jit
def _shortcut(
    x, beside, weight, bias, residual, out, outputs, own, other,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, EXACT: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outputs, WIDE)  # a program's neighbours have the same rows, which are still in the GPU's cache
    row, column = tl.program_id(0) // across * TALL, tl.program_id(0) % across * WIDE
    sums = tl.zeros([TALL, WIDE], tl.float32)
    for k in range(0, own, DEEP):  # beyond the last channel x is zeros, whatever the weights there are
        some, weights = x.load([row, k]), weight.load([column, k])
        if EXACT:  # float32 without TF32; and the interpreter takes bfloat16 for integers
            some, weights = some.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(some, weights.T, sums, input_precision="ieee")
    if PAIR:
        for k in range(0, other, DEEP):
            some, weights = beside.load([row, k]), weight.load([column, own + k])
            if EXACT:
                some, weights = some.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(some, weights.T, sums, input_precision="ieee")
    output = column + tl.arange(0, WIDE)
    sums += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    sums += residual.load([row, column]).to(tl.float32)
    out.store([row, column], sums.to(out.dtype))
