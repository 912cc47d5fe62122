"""fp8 where no GPU multiplies it: linear layers that round their numbers as the engine does, and multiply in float32.

What is lost is what the engine loses, up to the order of a sum; slowly, for rounding is a dozen operations of PyTorch's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear

from sdopt import timing
from sdopt.engine import fp8
from sdopt.kernels import to_float8


@contextmanager
def emulated(unet: nn.Module, scales: str = "row") -> Iterator[dict[str, nn.Linear]]:
    """Within, every linear layer of `unet` that fp8 can take computes with inputs and weights rounded to e4m3.

    `unet`: in bfloat16, on any device; weights are rounded once, on entering. `scales`: "row" or "tensor", as
    `engine.prepare` takes them. Gives the layers by their names. Raises UserError for other scales. Introduced in
    notebooks/13_fp8.
    """
    blocks = [block for part in unet.modules() for block in getattr(part, "transformer_blocks", ())]
    names, rounded = {part: name for name, part in unet.named_modules()}, {}
    with ExitStack() as stack:
        for layer in fp8.layers(blocks, fp8.asked("fp8", scales, "all")).values():
            takes = of = "row"
            if not layer.by_row:
                takes = fp8.scale_of(layer.largest())
                of = fp8.scale_of(torch.stack([part.weight.abs().amax() for part in layer.parts]).amax())
            for part in layer.parts:
                weight = to_float8.reference(part.weight.detach(), of)
                stack.enter_context(timing.swapped(part, "forward", partial(_forward, part, weight, takes)))
                rounded[names[part]] = part
        yield rounded


def back(scaled: to_float8.Scaled) -> torch.Tensor:
    """What rounded numbers stand for, in float32: `values * scale`. Introduced in notebooks/13_fp8."""
    flat = scaled.values.float().flatten(0, -2) * scaled.scale
    return flat.view(scaled.values.shape)


def _forward(part, weight, takes, x):
    bias = None if part.bias is None else part.bias.float()
    return linear(back(to_float8.reference(x, takes)), back(weight), bias).to(part.weight.dtype)
