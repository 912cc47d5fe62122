"""Attention of an image's positions among each other, from query, key and value as one product left them, side by side.

    out = softmax(q @ k.T / sqrt(d)) @ v,  head by head, d numbers a head

A program keeps a tile of queries and walks over the keys with a running maximum and sum, as in notebook 3. What is its own is
the size of its tiles, which are for few positions: 64 queries, so that there are enough of them for a large GPU, and few enough
warps for several programs a multiprocessor. While one is at its powers of two, another has the tensor cores. Once there are many
tiles a multiprocessor, a library's kernels are faster: see `fits`; the study `kernels` times both.

Operations: 4 * batch * tokens**2 * heads * d, on tensor cores. Bytes: three numbers read and one written a position and channel;
keys and values are read again for each tile of queries, from the GPU's cache. What comes out is a mean of values, and can be
written in e4m3 by a scale that is known before, as `prompt_attention`'s can.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sdopt.errors import UserError
from sdopt.kernels import launch
from sdopt.kernels.prompt_attention import LOG2_E
from sdopt.kernels.to_float8 import Scaled, in_e4m3, place
from sdopt.kernels.to_float8 import reference as rounded

NAME = "self_attention"
QUERIES, KEYS = 64, 128  # of a tile
WIDTHS = (16, 32, 64, 128)  # numbers of a head: a tile's row, fetched as it lies
FAST = 64  # numbers of a head that its tiles are for
FEW = 2**16  # queries, over all heads and samples, up to which it was the faster one at SDXL's sizes: tried on an H200


def self_attention(qkv: torch.Tensor, heads: int, scale: torch.Tensor | None = None) -> torch.Tensor | Scaled:
    """`qkv`: [batch, tokens, 3 * heads * d], contiguous, queries first, then keys, then values; returns [batch, tokens, heads * d].

    float32, float16 or bfloat16; d is 16, 32, 64 or 128. Scores and sums in float32. With a `scale`, one float32 number, the
    result is in e4m3 by that. Raises UserError for other shapes, layouts or dtypes. Source: https://arxiv.org/abs/2205.14135.
    Introduced in notebooks/11_fused_kernels.
    """
    launch.check(NAME, qkv)
    launch.check_shape(NAME, "the input", qkv, tuple(qkv.shape))
    batch, tokens, joined = qkv.shape if qkv.ndim == 3 else (0, 0, 0)
    width = joined // (3 * heads) if heads > 0 and joined % (3 * heads) == 0 else 0
    if width not in WIDTHS:
        raise UserError(f"{NAME}: {list(qkv.shape)} is not [batch, tokens, 3 * {heads} heads of {', '.join(map(str, WIDTHS))}]")
    if qkv.data_ptr() % launch.ALIGNED:
        raise UserError(f"{NAME}: the input does not begin at a multiple of {launch.ALIGNED} bytes")
    shape = (batch, tokens, heads * width)
    out = qkv.new_empty(shape) if scale is None else place(NAME, qkv, shape, scale, by_row=False)
    values, of_all = (out, qkv) if scale is None else out
    if qkv.numel():
        exact = launch.INTERPRETED or qkv.dtype is torch.float32
        keys = KEYS // 4 if qkv.dtype is torch.float32 else KEYS  # twice the bytes, and no tensor cores
        some = lambda tensor, rows: TensorDescriptor.from_tensor(tensor, [1, rows, width])
        launch.start(
            _self_attention,
            (triton.cdiv(tokens, QUERIES), heads, batch),
            *(some(qkv, QUERIES), some(qkv, keys), some(values, QUERIES), of_all, tokens, width**-0.5 * LOG2_E),
            *(QUERIES, keys, width, tokens % keys > 0, exact, scale is not None),
            num_warps=4,
            num_stages=2,
        )
    return out


def fits(qkv: torch.Tensor, heads: int) -> bool:
    """Whether it takes `qkv`, in 16 bits, and is faster there than a library's attention."""
    batch, tokens, joined = qkv.shape
    return joined == 3 * heads * FAST and 0 < batch * tokens * heads <= FEW and takes(qkv, heads)


def takes(qkv: torch.Tensor, heads: int) -> bool:
    """Whether it takes `qkv`, in 16 bits, and is made for the GPU."""
    return (
        qkv.shape[-1] in (3 * heads * width for width in WIDTHS)
        and qkv.dtype in (torch.float16, torch.bfloat16)
        and qkv.is_contiguous()
        and qkv.data_ptr() % launch.ALIGNED == 0
        and launch.fetches_tiles(qkv.device)
    )


def reference(qkv, heads, scale=None):
    """What `self_attention` computes, by PyTorch, in the dtype of its argument."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return seen if scale is None else rounded(seen, scale)


def bytes_moved(qkv: torch.Tensor, *_) -> int:
    """Bytes that must come and go: three numbers in for one out."""
    return (qkv.numel() + qkv.numel() // 3) * qkv.itemsize


@triton.jit
def _self_attention(
    of_query, of_key, out, of_all, tokens, scale,
    TALL: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr, EXACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row, head, sample = tl.program_id(0) * TALL, tl.program_id(1), tl.program_id(2)
    column, channels = head * WIDTH, tl.num_programs(1) * WIDTH
    q = of_query.load([sample, row, column]).reshape(TALL, WIDTH)
    if EXACT:  # float32 without TF32; and the interpreter takes bfloat16 for integers
        q = q.to(tl.float32)
    seen, total = tl.zeros([TALL, WIDTH], tl.float32), tl.zeros([TALL], tl.float32)
    top = tl.full([TALL], -float("inf"), tl.float32)
    for first in range(0, tokens, WIDE):
        k = of_key.load([sample, first, channels + column]).reshape(WIDE, WIDTH)
        if EXACT:
            k = k.to(tl.float32)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if CUT:  # beyond the last key are zeros, which weigh something
            scores = tl.where((first + tl.arange(0, WIDE) < tokens)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        less = tl.exp2(top - higher)
        total = total * less + tl.sum(weights, 1)
        v = of_key.load([sample, first, 2 * channels + column]).reshape(WIDE, WIDTH)
        if EXACT:
            v = v.to(tl.float32)
        seen = tl.dot(weights.to(v.dtype), v, seen * less[:, None], input_precision="ieee")
        top = higher
    seen /= total[:, None]
    if ROUNDS:
        line = row + tl.arange(0, TALL)
        seen = in_e4m3(seen, 0.0, of_all, line, line < tokens, False)
    out.store([sample, row, column], seen.to(out.dtype).reshape(1, TALL, WIDTH))
