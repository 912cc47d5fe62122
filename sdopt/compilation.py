"""Step 4: torch.compile, and what goes with it: the memory layout, and a scheduler that never waits for the GPU."""

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from sdopt.errors import UserError
from sdopt.models import start_at_step_zero
from sdopt.timing import compiled_parts

# The tutorial's flags, for GPUs. They go to torch.compile as options: set as globals they would hold for the whole
# process, and put back before the first call (when compiling happens) they would be silently ignored.
CUDA_OPTIONS = {
    "conv_1x1_as_mm": True,  # a 1x1 convolution is a matrix product, for which Inductor has more kernels
    "epilogue_fusion": False,  # leave pointwise work after a product to its own kernel
    "force_fuse_int_mm_with_mul": True,  # an int8 product is rescaled at once (no effect before step 6)
}
# The tutorial's search. It measures kernels while it compiles, minutes a graph, so it comes with max-autotune alone.
SEARCH = {
    "coordinate_descent_tuning": True,  # try neighbouring tile sizes of each generated kernel, and ...
    "coordinate_descent_check_all_directions": True,  # ... diagonal neighbours
}
# A search compiles its candidates in worker processes, which assemble them with this program. The process that measures them
# would take Triton's own, find nothing of that in its cache, and compile all of them again, one after another.
ASSEMBLER = Path(torch.__file__).parent / "bin" / "ptxas"

# The UNet's attention blocks: one class, few distinct shapes, so a handful of graphs serve the whole UNet. Not the
# transformer blocks inside alone, which is diffusers' choice: the projections around them would round to int8 eagerly.
REGIONS = ("Transformer2DModel",)

# A region's graphs are counted against one limit, each size of each block being one. fullgraph=True makes passing it an
# error, never a silent return to eager. (PyTorch before 2.12 has no such argument, its own limit of 8 stands there.)
LIMIT = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


@dataclass(frozen=True)
class Compiled:
    """What was compiled: "whole" (UNet and VAE decoder, one graph each) or "regional" (so many blocks of the UNet)."""

    kind: str
    regions: int


@dataclass(frozen=True)
class Graphs:
    """How many graphs a call compiled, and where the compiler had to break one (reasons, each with its count)."""

    compiled: int
    breaks: dict[str, int]


def channels_last(pipe):
    """Store the weights of UNet, VAE and ControlNet so that an image's channels are neighbours (NHWC); returns `pipe`.

    Convolution kernels of tensor cores and of CPUs read them in that order; shapes and results stay as they are.
    Source: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html. Introduced in
    notebooks/04_compile.
    """
    for part in (pipe.unet, pipe.vae, getattr(pipe, "controlnet", None)):
        if part is not None:
            part.to(memory_format=torch.channels_last)
    return pipe


def compile_pipeline(
    pipe, kind: str | None = None, mode: str = "reduce-overhead", backend="inductor", options: dict | None = None
) -> Compiled:
    """Step 4: compile UNet and VAE decoder in place with fullgraph=True; returns what was compiled.

    `kind` None: "whole" on a GPU; on a CPU "regional", the UNet's attention blocks alone: there a whole UNet takes a
    minute or more to compile, and convolutions stay with oneDNN, so that it and the VAE decoder gain little.
    `mode`'s own Inductor options ("reduce-overhead": CUDA graphs; "max-autotune": minutes of search as well, and with
    it SEARCH) are merged with CUDA_OPTIONS and with `options`, which win. Modules are compiled in place: saving works
    as before.
    The first call compiles; another size, batch or dtype compiles again. Applied twice it changes nothing.
    Raises UserError for an unknown kind or mode, and on a CPU without a C++ compiler.
    Source: diffusers' "Accelerate inference" tutorial; regional: https://docs.pytorch.org/tutorials/recipes/
    regional_compilation.html. Introduced in notebooks/04_compile.
    """
    cuda = pipe.unet.device.type == "cuda"
    kind = kind or ("whole" if cuda else "regional")
    if kind not in ("whole", "regional"):
        raise UserError(f"unknown kind of compilation '{kind}': use whole or regional")
    settings = {"fullgraph": True, "backend": backend} | LIMIT
    if backend == "inductor" and not cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("torch.compile needs a C++ compiler on a CPU: install g++, or name another in CXX")
    if backend == "inductor":
        settings["options"] = _options(mode, cuda, kind) | (options or {})
    if compiled_kind(pipe):
        return Compiled(compiled_kind(pipe), _compiled_regions(pipe))
    start_at_step_zero(pipe)
    quieten()
    if kind == "whole":
        pipe.unet.compile(**settings)
    else:
        for block in pipe.unet.modules():
            if type(block).__name__ in REGIONS:
                block.compile(**settings)
    if cuda or kind == "whole":
        # The decoder and not vae.decode: slicing and tiling, which are Python's loops, stay outside the graph.
        pipe.vae.decoder.compile(**settings)
    return Compiled(kind, _compiled_regions(pipe))


def quieten() -> None:
    """Silence a warning that says nothing: diffusers asks for PyTorch's version in a cached function, which is traced instead."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")


def compiled_kind(pipe) -> str | None:
    """How the UNet of `pipe` is compiled: "whole", "regional" or None."""
    if pipe.unet._compiled_call_impl is not None:
        return "whole"
    return "regional" if _compiled_regions(pipe) else None


def graphs(call: Callable[[], object]) -> Graphs:
    """Run `call()` and count the graphs that torch.compile made and broke in it. Introduced in notebooks/04_compile."""
    made, broken = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    call()
    new = {why: n - broken.get(why, 0) for why, n in counters["graph_break"].items() if n > broken.get(why, 0)}
    return Graphs(counters["stats"]["unique_graphs"] - made, new)


def graphs_so_far() -> dict:
    """How many graphs this process compiled, and how many it found compiled in Inductor's cache on disk."""
    found = counters["inductor"]["fxgraph_cache_hit"]
    return {"compiled": counters["stats"]["unique_graphs"] - found, "found": found}


def mode_options(mode: str) -> dict:
    """The options that torch.compile's `mode` stands for, to be merged with others; before a search, ASSEMBLER is set.

    Raises UserError for an unknown mode.
    """
    try:
        own = torch._inductor.list_mode_options(mode)
    except RuntimeError as error:
        raise UserError(f"unknown compile mode '{mode}': use default, reduce-overhead or max-autotune") from error
    if own.get("max_autotune") and ASSEMBLER.exists():
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ASSEMBLER))
    return own


def _options(mode, cuda, kind):
    own = mode_options(mode)
    if not cuda:
        return {}
    flags = CUDA_OPTIONS | (SEARCH if mode.startswith("max-autotune") else {})
    # CUDA graphs pay for a whole UNet. A graph a block would copy every block's inputs into its own memory first.
    return flags | (own if kind == "whole" else {})


def _compiled_regions(pipe):
    return compiled_parts(pipe.unet) - (pipe.unet._compiled_call_impl is not None)
