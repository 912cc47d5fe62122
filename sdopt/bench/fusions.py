"""Our fused kernels beside what they replace, for the study `kernels`: eager PyTorch, torch.compile, and a plain copy."""

from itertools import cycle

import torch
from torch.nn.functional import linear
from tqdm import tqdm

from sdopt import precision
from sdopt.kernels import (
    add_layer_norm,
    bias_residual,
    geglu,
    group_norm,
    linear_geglu,
    prompt_attention,
    self_attention,
    shortcut,
    softmax,
    upsample_conv,
)
from sdopt.timing import kernel_seconds

CACHE = 256 * 2**20  # inputs take turns, together several times a GPU's cache: each call finds its own in memory

# SDXL's at 1024x1024, two samples: its three levels and their widest after a skip connection; a level of its VAE decoder.
IMAGES = (
    (2, 320, 128, 128),
    (2, 960, 128, 128),
    (2, 640, 64, 64),
    (2, 1280, 32, 32),
    (2, 2560, 32, 32),
    (1, 256, 512, 512),
)
LOWER = ((2, 640, 32, 32), (2, 1280, 16, 16))  # SD 1.5's lower levels: a program keeps a group
TOKENS = ((8192, 640), (2048, 1280))
SMALL = ((2, 1280, 32, 32), (2, 640, 64, 64), (1, 512, 256, 256), (1, 256, 512, 512))  # images that are doubled
SKIPS = ((2, 640, 320, 320, 128), (2, 1280, 640, 640, 64), (2, 1280, 1280, 1280, 32))  # samples, channels of both, outputs, side
FUSIONS = (
    *((kernel, shape) for kernel in (group_norm, bias_residual) for shape in IMAGES),
    *((group_norm, shape) for shape in LOWER),
    *((shortcut, shape) for shape in SKIPS),
    *((add_layer_norm, shape) for shape in TOKENS),
    *((geglu, (tokens, 8 * channels)) for tokens, channels in TOKENS),  # a feed-forward's gates and values
    *((prompt_attention, (2, tokens // 2, channels)) for tokens, channels in TOKENS),
    *((self_attention, (samples, tokens // 2, channels)) for tokens, channels in TOKENS for samples in (1, 2)),
    *((linear_geglu, shape) for shape in TOKENS),  # all of a feed-forward's first half
    *((upsample_conv, shape) for shape in SMALL),
    (softmax, (4096, 16384)),  # a part of the attention in SDXL's VAE
)


def fusions(device, chosen=FUSIONS, **timed):
    """Seconds of each kernel at each shape: ours, eager, compiled, and of a copy that moves as many bytes.

    `timed` goes to `kernel_seconds`.
    """
    dtype, found = precision.half_dtype(device), []
    for kernel, shape in tqdm(chosen, desc="fused kernels"):
        first = _arguments(kernel, shape, device, dtype)
        moved = kernel.bytes_moved(*first)
        sets = [first, *(_arguments(kernel, shape, device, dtype) for _ in range(min(31, CACHE // moved)))]
        torch.compiler.reset()  # a graph a shape, of which PyTorch keeps no more than a few
        compiled = torch.compile(kernel.reference, fullgraph=True, dynamic=False)
        ways = {"ours": getattr(kernel, kernel.NAME), "eager": kernel.reference, "compiled": compiled}
        if kernel is linear_geglu:  # what it has to beat: a library's product, and our kernel after it
            ways["apart"] = lambda x, weight, bias: geglu.geglu(linear(x, weight, bias))
        seconds = {name: kernel_seconds(in_turn(way, sets), device, **timed) for name, way in ways.items()}
        halves = [torch.randint(256, (2, moved // 2), device=device, dtype=torch.uint8) for _ in sets]
        seconds["copy"] = kernel_seconds(in_turn(lambda to, of: to.copy_(of), halves), device, **timed)
        row = {"kernel": kernel.NAME, "shape": list(shape), "dtype": str(dtype)[6:], "bytes": moved}
        found.append(row | {"seconds": seconds})
    return found


def _arguments(kernel, shape, device, dtype):
    new = lambda *size: torch.randn(size, device=device).to(dtype)
    image = lambda: new(*shape).to(memory_format=torch.channels_last)
    if kernel is group_norm:
        return image(), 32, new(shape[1]), new(shape[1])
    if kernel is bias_residual:
        return image(), new(shape[1]), image()
    if kernel is shortcut:
        samples, own, other, outputs, side = shape
        x, residual, beside = (
            new(samples, n, side, side).to(memory_format=torch.channels_last) for n in (own, outputs, other)
        )
        return x, new(outputs, own + other) / (own + other) ** 0.5, new(outputs), residual, beside
    if kernel is add_layer_norm:
        return new(*shape), new(*shape), new(shape[1]), new(shape[1])
    if kernel is upsample_conv:
        weight = new(shape[1], shape[1], 3, 3).to(memory_format=torch.channels_last)
        return image(), weight, new(shape[1]), upsample_conv.folded(weight)  # once a picture, in the engine
    if kernel is prompt_attention:
        samples, _, channels = shape
        return new(*shape), *(new(samples, 77, channels) for _ in "kv"), max(1, channels // 64)
    if kernel is self_attention:
        return new(*shape[:2], 3 * shape[2]), max(1, shape[2] // 64)
    if kernel is linear_geglu:
        rows, inputs = shape  # four times as many outputs as inputs, and as many gates
        return new(rows, inputs), new(8 * inputs, inputs) / inputs**0.5, new(8 * inputs)
    if kernel is softmax:
        return torch.randn(shape, device=device), 512**-0.5, dtype
    return (new(*shape),)


def in_turn(way, sets):
    """A call of `way` with the next of the argument `sets`."""
    upcoming = cycle(sets)
    return lambda: way(*next(upcoming))
