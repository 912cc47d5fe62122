"""A number that a layer norm's linear layer, or GEGLU of it, is not beyond, whatever is normalised, from the weights alone.

    x = n * gamma + beta,  |n| = sqrt(inputs) at most                          (a layer norm's output)
    z_i = w_i . x + b_i,   |z_i| <= |w_i * gamma| * sqrt(inputs) + sum_k |w_ik * beta_k| + |b_i|      (Cauchy and Schwarz)
    |value * gelu(gate)| <= max_i |z_i| * |z_(i + outputs)|                    (|gelu(z)| is at most |z|)

Nothing in it cancels: x and w that are off by a share, as rounded ones are, go beyond it by no more than that share. Bytes: the
weights, read once. In PyTorch's operations what is weighed by gamma is written and read again, and beta is a product of its own:
three times the bytes, and a dozen kernels. A program sees some rows of values and the rows of their gates, and leaves the
largest product among them.
"""

import torch
import triton
import triton.language as tl

from sdopt.errors import UserError
from sdopt.kernels import launch

NAME = "gated_bound"
LONGEST = 16384  # inputs that a program can hold


def gated_bound(
    weight: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, beta: torch.Tensor, gated: bool = True
) -> torch.Tensor:
    """The bounds of some outputs each, float32 [programs]: the largest of them is that of all.

    `weight`: [2n, inputs], values first, contiguous; `bias`: [2n] or None; `gamma`, `beta`: [inputs], the layer norm's weight
    and bias; float32, float16 or bfloat16. Of a layer that is not `gated`, `weight` is [n, inputs], and the bound is its own.
    Raises UserError for other shapes, layouts or dtypes. Introduced in notebooks/13_fp8.
    """
    launch.check(NAME, weight, bias=bias, gamma=gamma, beta=beta)
    halves = 2 if gated else 1
    outputs, inputs = weight.shape[0] // halves, weight.shape[-1]
    launch.check_shape(NAME, "weight", weight, (halves * outputs, inputs))
    launch.check_shape(NAME, "bias", bias, (halves * outputs,))
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        launch.check_shape(NAME, name, tensor, (inputs,))
    if not 0 < inputs <= LONGEST or not outputs:
        raise UserError(f"{NAME} takes values and gates of 1 to {LONGEST} inputs, not {list(weight.shape)}")
    wide = triton.next_power_of_2(inputs)
    tall = max(1, min(4, 4096 // wide))
    out = torch.empty(triton.cdiv(outputs, tall), device=weight.device, dtype=torch.float32)
    launch.start(
        _gated_bound,
        (len(out),),
        *(weight, weight if bias is None else bias, gamma, beta, out, outputs, inputs, tall, wide, bias is not None, gated),
        num_warps=4 if wide * tall <= 4096 else 8,
    )
    return out


def reference(weight, bias, gamma, beta, gated=True):
    """The largest of what `gated_bound` computes, by PyTorch, in the dtype of its arguments."""
    spread = torch.linalg.vector_norm(weight * gamma, dim=1) * len(gamma) ** 0.5
    values = spread + weight.abs() @ beta.abs() + (0 if bias is None else bias.abs())
    return values.view(2, -1).prod(0).max() if gated else values.max()


def bytes_moved(weight: torch.Tensor, *_) -> int:
    """Bytes that must come: the weights."""
    return weight.numel() * weight.itemsize


@triton.jit
def _bound(weight, bias, row, column, gamma, beta, here, inside, inputs, BIASED: tl.constexpr):
    w = tl.load(weight + row.to(tl.int64)[:, None] * inputs + column[None, :], inside, 0.0).to(tl.float32)
    weighed = w * gamma[None, :]
    centre = tl.sum(tl.abs(w * beta[None, :]), 1)
    if BIASED:
        centre += tl.abs(tl.load(bias + row, here, 0.0).to(tl.float32))
    return tl.sqrt(tl.sum(weighed * weighed, 1) * inputs) + centre


@triton.jit
def _gated_bound(
    weight, bias, gamma, beta, out, outputs, inputs,
    TALL: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.arange(0, WIDE)
    here, real = row < outputs, column < inputs
    inside = here[:, None] & real[None, :]
    by, to = tl.load(gamma + column, real, 0.0).to(tl.float32), tl.load(beta + column, real, 0.0).to(tl.float32)
    values = _bound(weight, bias, row, column, by, to, here, inside, inputs, BIASED)
    if GATED:
        values *= _bound(weight, bias, row + outputs, column, by, to, here, inside, inputs, BIASED)
    tl.store(out + tl.program_id(0), tl.max(values, 0))
