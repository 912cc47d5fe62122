"""Attention of an image's positions over a prompt: few keys, so a program sees all of them at once.

    out = softmax(q @ k.T / sqrt(d)) @ v,  head by head, d numbers a head

Kernels for long sequences walk over the keys in a loop and keep a running maximum; set up for that, they take several times
longer for the 77 tokens of a prompt than moving its numbers does. Here a program loads a tile of queries and all keys and values
of one head, two products on tensor cores and an ordinary softmax between them. Heads lie beside each other in a row, as the
projections leave them, so nothing is transposed. Bytes: q read and `out` written, 2 * numel(q) * itemsize; keys and values
are a few hundred kilobytes that stay in the GPU's cache. What comes out is a mean of values, so nothing in it is beyond the
largest of them: with a scale from that it can be written in e4m3, in half the bytes and at no further pass.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch
from sdopt.kernels.to_float8 import Scaled, in_e4m3, place
from sdopt.kernels.to_float8 import reference as rounded

NAME = "prompt_attention"
MOST_KEYS = 256  # for each of a tile's queries a score a key lies in a program's registers
MOST = 2**15  # bytes of one head's keys: with as many of values they have to fit into the smallest multiprocessors
QUERIES = 64  # of a tile
LOG2_E = 1.4426950408889634  # powers of two are what a GPU computes: exp(x) = 2 ** (x * log2(e))


def prompt_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: torch.Tensor | None = None
) -> torch.Tensor | Scaled:
    """`q`: [batch, positions, heads * d], contiguous; `k`, `v`: [batch, tokens, heads * d], each row of which is contiguous.

    float32, float16 or bfloat16, all of one dtype; returns the shape of `q`. For few keys: see `fits`. Scores and sums in
    float32. With a `scale`, one float32 number, the result is in e4m3 by that. Raises UserError for other shapes, layouts or
    dtypes. Source: https://arxiv.org/abs/1706.03762.
    """
    launch.check(NAME, q, k=k, v=v)
    launch.check_shape(NAME, "q", q, tuple(q.shape))
    batch, positions, channels = q.shape if q.ndim == 3 else (0, 0, 0)
    tokens, width = k.shape[1] if k.ndim == 3 else 0, channels // heads if channels % heads == 0 else 0
    if not (tokens and width and fits(k, heads)):
        raise UserError(f"{NAME}: {tokens} tokens and {heads} heads of {channels} numbers are none, or too much to hold")
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (batch, tokens, channels) or tensor.stride(2) != 1 or tensor.dtype is not q.dtype:
            raise UserError(f"{NAME}: {name} is not [{batch}, {tokens}, {channels}] of {q.dtype} with contiguous rows")
    out = torch.empty_like(q) if scale is None else place(NAME, q, tuple(q.shape), scale, by_row=False)
    values, of_all = (out, q) if scale is None else out
    if q.numel():
        launch.start(
            _prompt_attention,
            (triton.cdiv(positions, QUERIES), heads, batch),
            *(q, k, v, values, of_all, positions, tokens, channels, *k.stride()[:2], *v.stride()[:2], width**-0.5 * LOG2_E),
            *(QUERIES, _padded(tokens), _padded(width), width),
            *(launch.INTERPRETED or q.dtype is torch.float32, scale is not None),
            num_warps=4,
        )
    return out


def fits(k: torch.Tensor, heads: int) -> bool:
    """Whether a program can hold the keys `k`, [batch, tokens, heads * d], of one head.

    In 16 bits 128 tokens with heads of up to 128, or 256 with heads of up to 64.
    """
    return k.shape[1] <= MOST_KEYS and _padded(k.shape[1]) * _padded(k.shape[2] // heads) * k.itemsize <= MOST


def _padded(n):
    """The size of a tile for `n` numbers: a power of two, and no less than tensor cores take."""
    return max(16, triton.next_power_of_2(n))


def reference(q, k, v, heads, scale=None):
    """What `prompt_attention` computes, by PyTorch, in the dtype of its arguments."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return seen if scale is None else rounded(seen, scale)


def bytes_moved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_) -> int:
    """Bytes that must come and go: queries, keys and values, and as many numbers out as queries."""
    return (2 * q.numel() + k.numel() + v.numel()) * q.itemsize


@triton.jit
def _prompt_attention(
    q, k, v, out, of_all, positions, tokens, channels, k_batch, k_row, v_batch, v_row, scale,
    TALL: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    position, head, batch = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1), tl.program_id(2)
    token, number = tl.arange(0, TOKENS), tl.arange(0, WIDE)
    own, here = (token < tokens)[:, None] & (number < WIDTH)[None, :], number < WIDTH
    inside = (position < positions)[:, None] & here[None, :]
    column = head * WIDTH + number
    at = (batch.to(tl.int64) * positions + position)[:, None] * channels + column[None, :]
    queries = tl.load(q + at, inside, 0.0)
    keys = tl.load(k + batch * k_batch + token[:, None] * k_row + column[None, :], own, 0.0)
    values = tl.load(v + batch * v_batch + token[:, None] * v_row + column[None, :], own, 0.0)
    if EXACT:  # float32 without TF32; and the interpreter takes bfloat16 for integers
        queries, keys, values = queries.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
    scores = tl.where((token < tokens)[None, :], scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    seen = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / total[:, None]
    if ROUNDS:
        seen = in_e4m3(seen, 0.0, of_all, position, position < positions, False)
    tl.store(out + at, seen.to(out.dtype.element_ty), inside)
