"""What happens in the process of one row: load, prepare, draw, time, look."""

import lzma
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from sdopt import attention, compilation, drawing, engine, models, path, precision, profiling
from sdopt import quantization, results, schedulers, timing
from sdopt.bench import claims, sensors
from sdopt.bench.process import KEEPING, PROFILING, RowFailed, summary
from sdopt.errors import UserError

FIRST_CALL = "first call"
UNSEEN = {"attention": None, "attention_unknown": "not looked at"}, {}  # in the place of a `unet_profile`
SPARE = 1 / 16  # of a GPU's memory: with less of it free, workers that stay beside each other give back what they can


@dataclass(frozen=True)
class Recipe:
    """One row of a study: steps of the path, with their options, then what the path has no step for."""

    id: str
    label: str
    steps: tuple[str, ...]
    options: dict = field(default_factory=dict)
    apply: Callable | None = None  # a function of the pipeline, in bench/recipes.py
    settings: dict = field(default_factory=dict)  # what the row says beside what it was drawn with
    compiled: bool = False  # by `apply`, that is
    searches: bool = False  # and for minutes, for the fastest kernels

    @property
    def compiles(self):
        return "compile" in self.steps or self.compiled


@dataclass(frozen=True)
class Job:
    """A recipe and the task it is measured with. `prompts` and `seeds`: one list a timed run, as long as the batch."""

    recipe: Recipe
    model: str
    weights: str
    device: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    scheduler: str
    prompts: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[int, ...], ...]
    cache: Path | None = None  # the folder of the compiler's cache, None: PyTorch's own
    search: str = claims.ALONE  # how the compiler searches

    @property
    def shares_search(self):
        """Whether several processes share its search: on a CPU they would take the cores that kernels are timed on."""
        return self.recipe.searches and self.device != "cpu"

    @property
    def inductor(self):
        """The folder of Inductor's cache; of a row that searches its own, for finds go into one file, where two would lose some."""
        return self.cache / (f"inductor-{self.recipe.id}" if self.recipe.searches else "inductor") if self.cache else None

    @property
    def claims(self):
        """The folder in which processes that share this row's search claim kernels."""
        return self.cache / "claims" / self.recipe.id if self.cache else None

    @property
    def artifacts(self):
        """The compiler's work for this row in one file, for a machine that has no cache yet."""
        return self.cache / f"{self.model}-{self.recipe.id}.bin.xz" if self.cache and self.recipe.compiles else None


def prepare(job, tell):
    """The pipeline of `job`, ready to draw, and its call's keywords; the first it tells is that the model has loaded."""
    return apply(load(job, tell), job.recipe)


def load(job, tell):
    """The pipeline of `job` as it is before its first step, in a process that is set up as all of them are."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # In every row, as someone who wants speed would have it: at its first call cuDNN times a convolution's kernels.
    torch.backends.cudnn.benchmark = str(job.device).startswith("cuda")
    if job.cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.inductor)
    _load_artifacts(job)
    pipe = models.load(job.model, job.weights, job.device)
    pipe.set_progress_bar_config(disable=True)
    tell("preparing")
    return pipe


def apply(pipe, recipe):
    """The pipeline with what `recipe` does to it, and its call's keywords. Raises RowFailed with the reason it cannot."""
    try:
        pipe, call_kwargs = path.prepare(pipe, recipe.steps, **recipe.options)
        if recipe.apply:
            pipe = recipe.apply(pipe)
    except UserError as error:  # this recipe cannot be applied here; the others may
        raise RowFailed(str(error)) from error
    return pipe, call_kwargs


def first_call(state, tell, job):
    """Load, prepare, draw once; `state` keeps what can draw.

    Returns {"prepare_s", "first_call_s", "graphs": {"found", "compiled"}}, the first two the way from a loaded pipeline to its
    first picture, less what it waited for others that timed kernels. What was compiled is exported once its search is done.
    Where that is for LATER: "left", the paths of the finds it left out, and "processes", how many could search them.
    """
    began = []
    pipe, call_kwargs = prepare(job, lambda phase: (began.append(time.perf_counter()), tell(phase)))
    took = time.perf_counter() - began[0]
    state["pipe"], state["call"], state["draw"] = pipe, call_kwargs, drawing.drawer(pipe, job, **call_kwargs)
    tell(FIRST_CALL + ", which compiles" * drawing.is_compiled(pipe))
    with claims.applied(job.search, job.claims) as search:
        seconds = timing.seconds_of(state["draw"], job.device)
    first = {"prepare_s": took, "first_call_s": seconds - sum(search.waited), "graphs": compilation.graphs_so_far()}
    if job.search == claims.LATER:
        return first | {"left": sorted(search.left), "processes": claims.processes()}
    if job.search == claims.ALONE:
        tell(KEEPING)
        keep_artifacts(job)
    return first


def settle(state, tell, job):
    """After `first_call`: draw until nothing is left to capture; what a row has beside its times and what a profiler finds.

    That stays in a process, and may slow down what is timed after it: see `look`.
    """
    tell("settling")
    pipe = state["pipe"]
    cuda = pipe.device.type == "cuda"
    if cuda:
        timing.settle_down(state["draw"], timing.SETTLING_CALLS)
    stages = timing.stages(pipe, lambda: drawing.all_finite(pipe, state["draw"]), timing.STAGE_CALLS if cuda else 1)
    memory, memory_of, counted = timing.peak_memory(cuda)
    counted.pop("device", None)  # the others' as well
    numbers = {"peak_memory_bytes": memory, "stages_ms": stages} | ({"memory_bytes": counted} if counted else {})
    return numbers | how_it_ran(pipe, job, state["call"], memory_of, UNSEEN)


def draw_timed(state, tell, run):
    """After `settle`: seconds of one drawing of run `run`, by a worker that has the memory for it already."""
    if state.pop("gave_back", False):
        state["draw"](run)
    seconds = timing.seconds_of(lambda: state["draw"](run), state["pipe"].device)
    if state["pipe"].device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < SPARE * total:
            give_back(state, tell)
    return seconds


def give_back(state, tell):
    """Leave to other processes the GPU's memory that is kept for the next picture."""
    if state["pipe"].device.type == "cuda":
        torch.cuda.empty_cache()
        state["gave_back"] = True


def look(state, tell, job):
    """After the timed calls: `unet_profile` of the row."""
    return unet_profile(state["pipe"], job, state["call"])


def new_size(state, tell, job):
    """After that, of a row on our engine: {"other_size": what a new size costs}; of others {}."""
    prepared = engine.is_prepared(state["pipe"])
    return {"other_size": other_size(state["pipe"], job, state["call"])} if prepared else {}


def other_size(pipe, job, call_kwargs):
    """What a size that a pipeline has not drawn yet costs, three quarters as high: seconds of its first picture and its second."""
    height = job.height * 3 // 4 // 64 * 64 or 2 * job.height
    draw = drawing.drawer(pipe, replace(job, height=height), **call_kwargs)
    first, second = (timing.seconds_of(draw, pipe.device) for _ in range(2))
    return {"height": height, "width": job.width, "first_s": first, "second_s": second}


def measure(state, tell, job):
    """Measure `job`, telling its phases; returns the row's numbers and its images (uint8 arrays, one list a run)."""
    pipe, call_kwargs = prepare(job, tell)
    compiles = ", which compiles" * drawing.is_compiled(pipe)
    seen = {}
    numbers, pictures = drawing.measure(
        pipe,
        job,
        lambda phase: tell(phase + (compiles if phase == "first call" else "")),
        sensors.watch(job.device, seen),
        **call_kwargs,
    )
    memory_of = numbers.pop("peak_memory_of")
    tell(PROFILING)
    keep_artifacts(job)
    graphs = {"graphs": compilation.graphs_so_far()} if compiles else {}
    numbers |= graphs | ({"gpu": seen} if seen else {}) | how_it_ran(pipe, job, call_kwargs, memory_of)
    return numbers, [list(map(np.asarray, images)) for images in pictures]


def how_it_ran(pipe, job, call_kwargs, memory_of, profile=None):
    """What a row says of itself beside its numbers; without a `profile` draws a few more steps, under the profiler."""
    attended, kernels = profile or unet_profile(pipe, job, call_kwargs)
    switches = as_run(pipe) | {"peak_memory_of": memory_of} | attended
    return {"drawn_with": drawn_with(pipe, job, call_kwargs), "as_run": switches} | kernels


def drawn_with(pipe, job, call_kwargs):
    """The settings of the call, as the result file names them."""
    cutoff = {"cutoff": job.recipe.options["cutoff"]} if "cfg_cutoff" in job.recipe.steps else {}
    return {
        "steps": call_kwargs.get("num_inference_steps", job.steps),
        "guidance_scale": call_kwargs.get("guidance_scale", job.guidance_scale),
        "scheduler": next(i for i, (cls, _) in schedulers.SCHEDULERS.items() if type(pipe.scheduler) is cls),
    } | cutoff


def as_run(pipe):
    """The switches a reader would ask about, as they stood while the row ran."""
    return {
        "unet_dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "vae_dtype": str(_vae_dtype(pipe)).removeprefix("torch."),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "omp_spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "compiled": compilation.compiled_kind(pipe),
        "int8_layers": quantization.int8_layers(pipe),
        "fp8_layers": engine.fp8_layers(pipe) or quantization.torchao_fp8_layers(pipe),
        **({"computes_in": "float32"} if precision.computes_in(pipe.unet) != pipe.unet.dtype else {}),
    }


def unet_profile(pipe, job, call_kwargs):
    """Which kernels attend in the UNet, and its calls' kernels by kind, from a profile of a few more steps.

    ({"attention": [...]}, {"unet_kernels": [{"samples", "ms": {kind: ms}, "longest": {kind: {name: ms}}}]}), of the latter
    one for each batch that the UNet sees: of its last call, which computes nothing that is computed once a picture. On a CPU none.
    """
    calls, answer = {}, []

    def profiled(run, sample, *args, **kwargs):
        calls[len(sample)] = profiling.profile(lambda: answer.append(run(sample, *args, **kwargs)))
        return answer.pop()

    steps = 10 if "callback_on_step_end" in call_kwargs else 2  # two calls of each batch, where guidance ends on the way
    draw = drawing.drawer(pipe, job, **call_kwargs | {"num_inference_steps": steps})
    try:
        with timing.around_calls(pipe.unet, profiled):
            draw(0, "latent")
    except RuntimeError as error:  # a profiler that is refused (in some containers) is no reason to lose the row
        return {"attention": None, "attention_unknown": summary(error)}, {}
    attended = {backend for seen in calls.values() for backend in attention.backends_in(seen.names)}
    ms = {n: {name: 1e3 * seconds for name, seconds in seen.kernels.items()} for n, seen in calls.items() if seen.kernels}
    kernels = [{"samples": n, "ms": profiling.by_kind(of), "longest": profiling.longest(of)} for n, of in ms.items()]
    return {"attention": sorted(attended)}, {"unet_kernels": kernels} if kernels else {}


def _vae_dtype(pipe):
    # SDXL's pipeline decodes in float32 when its VAE is in float16 and says it would overflow
    upcast = pipe.vae.dtype is torch.float16 and pipe.vae.config.get("force_upcast")
    return torch.float32 if upcast and hasattr(pipe, "upcast_vae") else pipe.vae.dtype


def _load_artifacts(job):
    if job.artifacts and job.artifacts.exists():
        try:
            torch.compiler.load_cache_artifacts(lzma.decompress(job.artifacts.read_bytes()))
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{job.artifacts} is damaged: delete it, and what it held is compiled anew") from error


def keep_artifacts(job):
    """Export what this process compiled, or found where no export is."""
    if job.artifacts and (compilation.graphs_so_far()["compiled"] or not job.artifacts.exists()):
        saved = torch.compiler.save_cache_artifacts()
        if saved:
            results.write_whole(job.artifacts, lzma.compress(saved[0], preset=1))  # a tenth of it, or less
