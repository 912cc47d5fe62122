"""What ran in a call, by the names a profiler saw: operators that Python asked for, kernels of the GPU and their times."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A kernel's kind is the first of these that its name matches, OTHER where none does. Compiled code names a kernel after
# the operators it fuses, so "convolution" in one of those may be a bias; only its templates (tem) multiply matrices, and one
# that lists "mm" is the template of that, whatever stood before it.
FUSED = r"^triton_(?!tem)"
PRODUCT = r"^triton_tem_.*_b?mm(_|$)"
KINDS = {
    "attention": r"sdpa|fmha|flash|attention",
    "convolution": r"conv|fprop|dgrad|winograd|nchwToNhwc|nhwcToNchw",
    "matrix product": r"gemm|gemv|nvjet|cutlass|splitK|cublas|triton_tem|_linear_geglu",
}
OTHER = "other"  # norms, pointwise work, copies
NAME = 100  # characters of a kernel's name that are kept: compiled code lists in it all that it fused


@dataclass(frozen=True)
class Profile:
    """What ran in a call: names of operators, and of kernels with the seconds each had the GPU (none on a CPU)."""

    operators: frozenset[str]
    kernels: dict[str, float]

    @property
    def names(self):
        """Operators and kernels."""
        return self.operators | set(self.kernels)


def profile(call: Callable[[], object]) -> Profile:
    """Run `call()` under PyTorch's profiler.

    Kernels inside CUDA graphs and compiled code are seen as well. The profiler costs the CPU time, so a call's
    duration is for `timing` to tell; kernels run as they do without it.
    Raises RuntimeError when the profiler saw nothing of a GPU at work. Introduced in notebooks/03_sdpa.
    """
    with torch.profiler.profile() as seen:
        call()
    operators, kernels = set(), {}
    for event in seen.events():
        if event.device_type.name == "CPU":
            operators.add(event.name)
        elif not event.is_user_annotation:  # a named range spans kernels that are there themselves
            kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    if torch.cuda.is_initialized() and not kernels:
        raise RuntimeError("the profiler saw no kernel of the GPU")
    return Profile(frozenset(operators), kernels)


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Time by kind of kernel, for {name: time}: a key for each of KINDS, and OTHER.

    Attention is the fused kernels alone: attention by the formula is matrix products and others. Introduced in
    notebooks/13_fp8.
    """
    kinds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, time in kernels.items():
        kinds[kind_of(name)] += time
    return kinds


def longest(kernels: dict[str, float], each: int = 5) -> dict[str, dict[str, float]]:
    """Of {name: time}, by kind the `each` kernels that took longest, longest first; names of fused ones are cut short.

    A row keeps them beside its times by kind: they say whose kernels ran, a library's or a compiler's.
    """
    kinds = {}
    for name in sorted(kernels, key=kernels.get, reverse=True):
        own = kinds.setdefault(kind_of(name), {})
        if len(own) < each:
            own[name[:NAME]] = own.get(name[:NAME], 0.0) + kernels[name]
    return kinds


def kind_of(kernel: str) -> str:
    """The kind of the kernel of that name: one of KINDS, or OTHER."""
    if re.search(FUSED, kernel):
        return OTHER
    if re.search(PRODUCT, kernel):
        return "matrix product"
    return next((kind for kind, name in KINDS.items() if re.search(name, kernel, re.IGNORECASE)), OTHER)
