"""Exercises of notebooks/01_baseline_fp32."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sdopt.exercises import number


def _scores(answer):
    return number(
        answer, 5.06, 5.07,
        "how many positions has a latent that is 8 times smaller each way? A score for every pair, head and sample, "
        "4 bytes each, 2**30 bytes to the GiB",
        "GiB",
    )  # fmt: skip


def _to_tf32(answer):
    if not callable(answer):
        return f"give the function itself, not {answer!r}"
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 1e30 * x, 1e-20 * x, torch.tensor([0.0, 1.0, -2.5, 1 - 2.0**-20])])
    given = x.clone()
    rounded = answer(x)
    if not torch.equal(x, given):
        return "the tensor that came in was changed: make a new one"
    if not isinstance(rounded, torch.Tensor) or rounded.dtype != torch.float32 or rounded.shape != x.shape:
        return "return a float32 tensor of the same shape"
    if not rounded.isfinite().all() or (rounded[given != 0] == 0).any():
        return "large values became infinite, or small ones zero: TF32 has float32's range"
    if (rounded.view(torch.int32) & 8191).any():
        return "some results need more than 10 bits of fraction: the lowest 13 bits must be zero"
    error = ((rounded - given).abs() / given.abs().clamp_min(1e-38)).max().item()
    if error > 2.0**-11 * 1.0001:
        return f"the largest relative error is {error:.1e}, rounding to nearest stays below {2.0**-11:.1e}"
    return None


class _ByHand(TorchFunctionMode):
    """Within, PyTorch's own attention raises."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            raise RuntimeError("scaled_dot_product_attention is what this is to do without")
        return function(*args, **(kwargs or {}))


def _attend(answer):
    if not callable(answer):
        return f"give the function itself, not {answer!r}"
    generator = torch.Generator().manual_seed(0)
    for tokens, gain, where in ((64, 1, ""), (77, 1, " with 77 keys"), (64, 100, " with scores in the hundreds")):
        q = gain * torch.randn(2, 4, 64, 16, generator=generator)
        k, v = torch.randn(2, 2, 4, tokens, 16, generator=generator)
        right = scaled_dot_product_attention(q, k, v)
        with _ByHand():
            mine = answer(q, k, v)
        if not isinstance(mine, torch.Tensor) or mine.shape != right.shape:
            shape = list(mine.shape) if isinstance(mine, torch.Tensor) else mine
            return f"the result should be a tensor {list(right.shape)}, not {shape}"
        if not torch.allclose(mine, right, atol=1e-4):
            off = (mine - right).abs().max().item()
            return f"off by up to {off:.2g}{where}: check the scale, and which dimension the softmax goes over"
    return None


EXERCISES = {"01.1": _scores, "01.2": _to_tf32, "01.3": _attend}
