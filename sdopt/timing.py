"""Time and memory of a call: whole calls by the host's clock, their stages by events, the first call apart."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps

import torch

from sdopt.errors import UserError

SETTLING_CALLS = 2  # on a GPU, after the first call and before the timed ones
STAGE_CALLS = 3  # on a GPU, beside the timed ones


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call and of each later one; peak memory in bytes and what it is the peak of.

    `memory_bytes`, on a GPU: peak "allocated" and "reserved" by PyTorch, and "device", what was in use of the whole GPU
    (by CUDA itself and by anyone else, too) after the timed calls.
    """

    first_call_s: float
    runs_s: tuple[float, ...]
    peak_memory_bytes: int
    peak_memory_of: str
    memory_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.runs_s)

    @property
    def p20(self) -> float:
        return percentile(self.runs_s, 20)

    @property
    def p80(self) -> float:
        return percentile(self.runs_s, 80)


def latency(runs_s) -> dict:
    """Seconds of timed calls as a result file has them: {"median", "p20", "p80", "runs"}."""
    runs = list(runs_s)
    return {"median": statistics.median(runs), "p20": percentile(runs, 20), "p80": percentile(runs, 80), "runs": runs}


def percentile(values, percent: int) -> float:
    """The value that `percent` of `values` stay below, interpolated; UserError for a percentage that is not 1 to 99.

    Introduced in notebooks/00_measure_first.
    """
    if not 1 <= percent <= 99:
        raise UserError(f"no value is the percentile {percent}: use 1 to 99")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def measure(
    call: Callable[[], object], runs: int, device: str | None = None, settle: int = SETTLING_CALLS, during=nullcontext()
) -> Timing:
    """Time `call()`: once to warm up, timed apart, then `runs` times; seconds by a host clock, GPU synchronised.

    The first call compiles and picks kernels, so it is no sample of the others; on a GPU `settle` more follow untimed:
    two, because a CUDA graph is captured at the second call of a module and replayed from the third; one will do where
    nothing is compiled. The timed calls are made within `during`. Peak memory is that of the timed calls on a GPU: what
    PyTorch reserved there, since what it counts as allocated leaves out the insides of CUDA graphs. On a CPU it is the
    process's peak resident set, which cannot be reset and so counts loading and compiling as well. `device` None: the
    GPU if there is one.
    Raises UserError for fewer than 1 run. Introduced in notebooks/00_measure_first.
    """
    if runs < 1:
        raise UserError(f"{runs} runs measure nothing: use 1 or more")
    cuda = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    first = _timed(call, cuda)
    if cuda:
        settle_down(call, settle)
    with during:
        times = tuple(_timed(call, cuda) for _ in range(runs))
    return Timing(first, times, *peak_memory(cuda))


def settle_down(call: Callable[[], object], times: int) -> None:
    """On a GPU, call `times` times before timing; the last gives back what loading left behind, and counts memory anew."""
    for left in reversed(range(times)):
        if not left:
            torch.cuda.empty_cache()  # what loading and compiling left behind is not what a picture needs
            torch.cuda.reset_peak_memory_stats()
        call()


def peak_memory(cuda: bool) -> tuple[int, str, dict]:
    """Peak bytes so far, what they are the peak of, and on a GPU the three ways to count them (see `Timing`)."""
    if cuda:
        free, total = torch.cuda.mem_get_info()
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        memory = {"allocated": allocated, "reserved": reserved, "device": total - free}
        return reserved, "CUDA memory reserved by PyTorch", memory
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set of the process", {}


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds of one `call()` by a host clock, the GPU synchronised before and after."""
    return _timed(call, str(device).startswith("cuda"))


def kernel_seconds(
    call: Callable[[], object], device: str, repeats: int = 20, rounds: int = 15, pick=statistics.median
) -> float:
    """Seconds of one `call()` without what launching it costs, by `pick` over the rounds; for calls of a few kernels.

    On a GPU, `repeats` calls are recorded into one CUDA graph, and its replays timed by events; on a CPU they are made
    in a row. `call` must do the same at every call and, on a GPU, never wait for it. Introduced in
    notebooks/05_fused_qkv.
    """
    if not str(device).startswith("cuda"):
        return in_turns([call], device, rounds, repeats, pick)[0]
    side = torch.cuda.Stream()  # a capture must not find anything left to initialise
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    watch = stopwatch(device)
    for _ in range(rounds + 3):
        start = watch.mark()
        graph.replay()
        watch.spans.append(("graph", start, watch.mark()))
    return pick([ms for _, ms in watch.read()[3:]]) / 1e3 / repeats


def in_turns(calls, device: str, rounds: int = 9, repeats: int = 1, pick=statistics.median) -> list[float]:
    """Seconds of each call, by `pick` over its `rounds`; calls take turns, so that a busy moment of the machine hits all.

    Two rounds more warm up. `repeats` calls in a row are timed as one and divided, for calls of a few microseconds.
    Introduced in notebooks/05_fused_qkv.
    """
    cuda = str(device).startswith("cuda")
    times = [[_timed(lambda: [call() for _ in range(repeats)], cuda) for call in calls] for _ in range(rounds + 2)]
    return [pick(kept) / repeats for kept in zip(*times[2:], strict=True)]


def share(module, chosen: Callable[[str, torch.nn.Module], bool], call: Callable[[], object], rounds: int = 9) -> float:
    """The share of `call()` that is spent in the parts of `module` with `chosen(name, part)`: median of `rounds`.

    By a stopwatch, so that no part makes the GPU wait for the CPU; eager modules only. Introduced in
    notebooks/05_fused_qkv.
    """
    shares = []
    for _ in range(rounds):
        watch, started = stopwatch(next(module.parameters()).device), []
        hooks = []
        for name, part in module.named_modules():
            if chosen(name, part):
                hooks.append(part.register_forward_pre_hook(lambda *_: started.append(watch.mark())))
                after = lambda *_: watch.spans.append(("part", started.pop(), watch.mark()))
                hooks.append(part.register_forward_hook(after))
        start = watch.mark()
        call()
        watch.spans.append(("whole", start, watch.mark()))
        for hook in hooks:
            hook.remove()
        *parts, (_, whole) = watch.read()
        shares.append(sum(ms for _, ms in parts) / whole)
    return statistics.median(shares)


def stages(pipe, call: Callable[[], object], calls: int = 1) -> dict:
    """Where a `call()` spends its time: milliseconds by stage, medians of so many `calls`, and the number of UNet calls.

    Returns {"text_encoder", "unet", "unet_calls", "scheduler", "vae"}, VAE encoding included. On a GPU the times are
    between CUDA events, so a stage that waits for the CPU to launch its kernels is charged for the wait, or for a pause
    in which Python collects its garbage; there, give it STAGE_CALLS calls beside the timed ones. A compiled module is
    timed from outside and not compiled again. Raises UserError for no calls. Introduced in notebooks/00_measure_first.
    """
    if calls < 1:
        raise UserError(f"{calls} calls take no time: use 1 or more")
    seen = [_stages_of_one(pipe, call) for _ in range(calls)]
    return {stage: statistics.median(ms[stage] for ms in seen) for stage in seen[0]}


def _stages_of_one(pipe, call):
    watch = stopwatch(pipe.unet.device)
    with around_stages(pipe, partial(_mark, watch)):
        call()
    ms = dict.fromkeys(("text_encoder", "unet", "unet_calls", "scheduler", "vae"), 0)
    for stage, span in watch.read():
        ms[stage] += span
        ms["unet_calls"] += stage == "unet"
    return ms


@contextmanager
def around_stages(pipe, around):
    """Within, each call of a stage of `pipe` is `around(stage, run, *args, **kwargs)`, where `run` is the call itself.

    The stages are "text_encoder", "unet", "scheduler" and "vae", encoding included.
    """
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    with ExitStack() as stack:
        for module, stage in (*((encoder, "text_encoder") for encoder in encoders), (pipe.unet, "unet")):
            stack.enter_context(around_calls(module, partial(around, stage)))
        for method in ("scale_model_input", "step"):
            stack.enter_context(_around_method(pipe.scheduler, method, partial(around, "scheduler")))
        for method in ("encode", "decode"):
            stack.enter_context(_around_method(pipe.vae, method, partial(around, "vae")))
        yield


def stopwatch(device):
    """Marks in time that make no one wait: `mark()`; put (name, start, end) into `spans`; `read()` gives (name, ms).

    On a GPU a mark is an event, stamped when the GPU gets to it; on a CPU the host's clock. Introduced in
    notebooks/01_baseline_fp32.
    """
    return _CudaWatch() if str(device).startswith("cuda") else _CpuWatch()


def _timed(call, cuda):
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


@contextmanager
def swapped(owner, name, function):
    """Within, `owner.name` is `function`; `owner` is as it was afterwards, whether the attribute was its own or not."""
    was_own, before = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        if was_own:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)


def compiled_parts(module) -> int:
    """How many modules within `module`, itself among them, torch.compile has been asked for."""
    return sum(part._compiled_call_impl is not None for part in module.modules())


def around_calls(module, around):
    """A context in which a call of `module` is `around(run, *args, **kwargs)`, where `run` is the call itself.

    A module's call goes through this slot when torch.compile has filled it. Unlike a hook, a function put there is not
    part of what the compiler traced, so nothing is compiled again.
    """
    run = module._compiled_call_impl or module._call_impl
    return swapped(module, "_compiled_call_impl", partial(around, run))


def _around_method(owner, name, around):
    """A context in which a call of `owner.name` is `around(run, *args, **kwargs)`, where `run` is the call itself."""
    run = getattr(owner, name)
    return swapped(owner, name, wraps(run)(partial(around, run)))  # pipelines look at signatures


def _mark(watch, stage, inner, *args, **kwargs):
    start = watch.mark()
    result = inner(*args, **kwargs)
    watch.spans.append((stage, start, watch.mark()))
    return result


class _CpuWatch:
    def __init__(self):
        self.spans = []

    def mark(self):
        return time.perf_counter()

    def read(self):
        return [(stage, (end - start) * 1e3) for stage, start, end in self.spans]


class _CudaWatch(_CpuWatch):
    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self):
        torch.cuda.synchronize()
        return [(stage, start.elapsed_time(end)) for stage, start, end in self.spans]
