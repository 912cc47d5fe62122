"""Exercises of notebooks/11_fused_kernels."""

import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from sdopt.exercises import number


def _epilogue(answer):
    return number(
        answer, 160, 160,
        "add up what the product writes and what GEGLU reads and writes, 2 bytes a number, over 2**20; then again with "
        "one writing, that of the result",
        unit="MiB",
    )  # fmt: skip


def _merge(answer):
    generator = torch.Generator().manual_seed(0)
    for middle, sizes in ((0.0, (5, 9)), (-3.0, (1, 40)), (1000.0, (300, 200))):
        values = torch.randn(sum(sizes), generator=generator) + middle
        values[: sizes[0]] += 2  # two parts that differ in their mean
        parts = [_moments(part) for part in values.split(sizes)]
        right = _moments(values)
        for a, b in (parts, parts[::-1]):
            merged = answer(a, b)
            if not isinstance(merged, (tuple, list)) or len(merged) != 3:
                return "return three things: count, mean and squares of both parts together"
            for name, one, other in zip(("count", "mean", "squares"), merged, right):
                if not abs(float(one) - float(other)) <= 1e-4 * abs(float(other)) + 1e-5:
                    return (
                        f"{name} is {float(one):.6g} where {float(other):.6g} is right, for parts of {sizes[0]} and "
                        f"{sizes[1]} numbers around {middle:g}: weigh the means by the counts, and add to the squares "
                        "what the means lie apart, by their difference"
                    )
    return None


def _moments(values):
    exact = values.double()
    squares = (exact - exact.mean()).square().sum()
    return torch.tensor(float(len(values))), exact.mean().float(), squares.float()


class _Used(TorchDispatchMode):
    """Notes PyTorch's operations by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def _swiglu(answer):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 128), (5, 2 * 70), (3, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            value, gate = x.double().chunk(2, -1)
            right = value * silu(gate)
            with _Used() as used:
                given = answer(x)
            where = f"for {list(shape)} in {str(dtype)[6:]}"
            if not isinstance(given, torch.Tensor) or given.shape != right.shape or given.dtype != dtype:
                return f"return a tensor {list(right.shape)} of the dtype of x {where}"
            off = (given.double() - right).abs() - torch.finfo(dtype).eps * right.abs()
            if not (off <= 1e-5).all():
                return f"off by up to {(given.double() - right).abs().max():.2g} {where}: values first, then gates"
            if arithmetic := used.names & {"silu", "silu_", "sigmoid", "mul", "mul_", "exp", "div"}:
                return f"right, but by PyTorch's {min(arithmetic)}: compute it in a kernel of yours, between load and store"
    return None


EXERCISES = {"11.1": _epilogue, "11.2": _merge, "11.3": _swiglu}
