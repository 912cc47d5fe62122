"""How kernels are started, and what all of them ask before."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import torch
import triton

from sdopt.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret  # as it stood when the kernels beside this file were decorated
THREADS = 16
HOPPER = 9  # of compute capability 9.0
ALIGNED = 16  # bytes: rows must begin at multiples of it to be fetched a tile at a time
_ahead = ContextVar("ahead", default=None)  # a list while kernels are compiled and not started: of these


def start(kernel, grid: tuple[int, ...], *arguments, **settings):
    """Start the programs of `grid`; compiled when its like has not been started before. See `compile_ahead`."""
    ahead = _ahead.get()
    if ahead is None:
        kernel[grid](*arguments, **settings)
    else:
        ahead.append(kernel.warmup(*arguments, grid=grid, **settings))


def compile_ahead(call):
    """Run `call()` with no kernel started, and compile those it would have started: many at once, not one after another.

    One takes some 0.3 s, and as long again the C function that starts it, which Triton leaves for the first start. What `call`
    computes holds anything. Nothing happens where kernels are interpreted, or by a Triton that has no AsyncCompileMode.
    """
    if INTERPRETED or not hasattr(triton, "AsyncCompileMode"):
        return
    kernels = []
    token = _ahead.set(kernels)
    try:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
            with triton.AsyncCompileMode(threads):
                call()
            if kernels:
                list(threads.map(partial(_load, torch.cuda.current_device()), set(kernels)))
    finally:
        _ahead.reset(token)


def _load(device, kernel):
    """What is left to do at a kernel's first start: its C function, and the driver's copy on `device`, a thread's own matter."""
    with torch.cuda.device(device):
        return (kernel.result() if hasattr(kernel, "result") else kernel).run


def check(kernel: str, x: torch.Tensor, **others: torch.Tensor | None):
    """Raise UserError unless `kernel` can run on `x` and the `others`: floats, all on one device that Triton can use."""
    if not (x.is_cuda or INTERPRETED):
        raise UserError(
            f"{kernel} needs a CUDA GPU; TRITON_INTERPRET=1, set before Python starts, interprets it on a CPU"
        )
    if x.dtype not in FLOATS:
        raise UserError(f"{kernel} takes float32, float16 or bfloat16, not {str(x.dtype)[6:]}")
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise UserError(f"{kernel}: {name} is on {other.device}, the input on {x.device}: move one to the other")


def check_shape(kernel: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], rows_apart: bool = False):
    """Raise UserError unless `tensor` is None or contiguous with `shape`; with `rows_apart`, each of its rows alone."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise UserError(f"{kernel}: {name} has shape {list(tensor.shape)}, {list(shape)} was expected")
    if not (tensor[:1] if rows_apart and tensor.ndim == 2 else tensor).is_contiguous():
        raise UserError(f"{kernel}: {name} is not contiguous: call .contiguous() on it")


def check_image(kernel: str, x: torch.Tensor):
    """Raise UserError unless `x` is an image in channels_last memory, [batch, channels, height, width]."""
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise UserError(
            f"{kernel} takes [batch, channels, height, width] in channels_last memory: "
            "call .to(memory_format=torch.channels_last) on it"
        )


def fetches_tiles(device: torch.device) -> bool:
    """Whether a GPU fetches a tile by one instruction, as the kernels' tiles were chosen for: Hopper does, and no older one.

    Newer ones do, too, and none has been tried. True for what is no GPU.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == HOPPER


def multiprocessors(x: torch.Tensor) -> int:
    """How many the GPU of `x` has, one where kernels are interpreted."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def memory(x: torch.Tensor) -> int:
    """Bytes that a multiprocessor of the GPU of `x` has for what one program loads, an H200's where kernels are interpreted."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 227 * 1024


def tiles(rows: int, columns: int) -> tuple[tuple[int, int], int, int]:
    """(grid, rows a tile, columns a tile) for a kernel that looks at each number once: tiles of 2048 numbers, or less."""
    wide = min(512, triton.next_power_of_2(max(1, columns)))
    tall = 2048 // wide
    return (triton.cdiv(rows, tall), triton.cdiv(columns, wide)), tall, wide
