"""fp8 where no GPU multiplies it: layers that round their numbers as the engine's do, and multiply in float32.

What is lost is what the engine loses, up to the order of a sum, and to the scale of what attention over a prompt gives, which is
found from that and not from the prompt; slowly, for rounding is a dozen operations of PyTorch's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from sdopt import timing
from sdopt.engine import bounds, fp8
from sdopt.kernels import to_float8
from sdopt.kernels.conv_float8 import flat

ALL = torch.arange(256, dtype=torch.uint8).view(to_float8.E4M3).float()  # numbers of e4m3, in the order of their bits


@contextmanager
def emulated(unet: nn.Module, scales: str = "row") -> Iterator[dict[str, nn.Module]]:
    """Within, every layer of `unet` that fp8 can take, linear or a convolution, has inputs and weights rounded to e4m3.

    `unet`: in bfloat16, on any device; weights are rounded once, on entering. `scales`: "row" or "tensor", as
    `engine.prepare` takes them. Gives the layers by their names. Where a layer has one scale it is a bound of what the norm or
    the attention before it can give: other inputs may saturate. Raises UserError for other scales, or a UNet that is not in
    bfloat16. Introduced in notebooks/13_fp8.
    """
    fp8.check_dtype(unet, "UNet")
    names, rounded = {part: name for name, part in unet.named_modules()}, {}
    with ExitStack() as stack:
        for layer in fp8.every_layer(unet, scales).values():
            if isinstance(layer, fp8.Convolution):
                takes = bounds.scale_of(*bounds.of_each([layer.after]))
                kernel = back(to_float8.reference(flat(layer.conv.weight.detach()))).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
                stack.enter_context(timing.swapped(layer.conv, "forward", partial(_convolved, layer.conv, kernel, takes)))
                rounded[names[layer.conv]] = layer.conv
                continue
            takes = of = "row"
            if not layer.by_row:
                takes = layer.after and bounds.scale_of(*bounds.of_each([layer.after]))
                of = bounds.scale_of(torch.stack([part.weight.abs().amax() for part in layer.parts]).amax())
            for part in layer.parts:
                weight = back(to_float8.reference(part.weight.detach(), of))
                stack.enter_context(timing.swapped(part, "forward", partial(_forward, part, weight, takes)))
                rounded[names[part]] = part
        yield rounded


def back(scaled: to_float8.Scaled) -> torch.Tensor:
    """What rounded numbers stand for, in float32: `values * scale`. Introduced in notebooks/13_fp8."""
    bits = scaled.values.view(torch.uint8).flatten().int()
    values = ALL.to(bits.device).index_select(0, bits)  # on a CPU four times as fast as a conversion
    return (values.view(-1, scaled.values.shape[-1]) * scaled.scale).view(scaled.values.shape)


def _forward(part, weight, takes, x):
    takes = bounds.of_values(x) if takes is None else takes
    bias = None if part.bias is None else part.bias.float()
    return linear(back(to_float8.reference(x, takes)), weight, bias).to(part.weight.dtype)


def _convolved(conv, kernel, takes, x):
    bias = None if conv.bias is None else conv.bias.float()
    return conv2d(back(to_float8.reference(x, takes)), kernel, bias, padding=1).to(conv.weight.dtype)
