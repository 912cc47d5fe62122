"""The nine steps as data: taught in one order, applied in another."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

import torch

from sdopt import engine
from sdopt.attention import fuse_qkv, plain_attention, sdpa
from sdopt.autoencoders import tiny_vae
from sdopt.compilation import channels_last, compile_pipeline
from sdopt.errors import UserError
from sdopt.guidance import cutoff, interval
from sdopt.models import start_at_step_zero
from sdopt.precision import full_precision, half_precision
from sdopt.quantization import int8
from sdopt.schedulers import SCHEDULERS, use_scheduler
from sdopt.timing import compiled_parts


@dataclass(frozen=True)
class Options:
    """What a step can be told. The defaults are the path's."""

    tf32: str = "convolutions"  # baseline_fp32: see precision.set_tf32
    dtype: torch.dtype | None = None  # bf16: None picks bfloat16, or float16 where the GPU lacks it
    attention: str | None = None  # sdpa: the backend, None leaves PyTorch its choice
    compiler: dict = field(default_factory=dict)  # compile: keywords of compilation.compile_pipeline
    int8_anyway: bool = False  # int8: on a GPU, too, where no layer gains from it
    tiny_vae: str | None = None  # tiny_vae: a folder, a hub name or "random", None finds it
    steps: int = 20  # dpm_20: the steps of the row before, never exceeded by its 20
    cutoff: float = 0.4  # cfg_cutoff: the share of the steps that are guided


@dataclass(frozen=True)
class Step:
    """One step of the path. `apply(pipe, options)` changes the pipeline, `call_kwargs(pipe, options)` its call."""

    id: str
    title: str
    notebook: str
    apply: Callable[[object, Options], object] = lambda pipe, o: pipe
    call_kwargs: Callable[[object, Options], dict] = lambda pipe, o: {}


def _baseline(pipe, o):
    return plain_attention(full_precision(pipe, o.tf32))


def _compile(pipe, o):
    return compile_pipeline(channels_last(pipe), **o.compiler)


def _twenty(pipe, o):
    return {"num_inference_steps": min(20, o.steps)}


STEPS = (  # in the order they are taught
    Step("baseline_fp32", "fp32, plain attention", "01_baseline_fp32", _baseline),
    Step("bf16", "half precision", "02_bf16", lambda pipe, o: half_precision(pipe, o.dtype)),
    Step("sdpa", "scaled dot-product attention", "03_sdpa", lambda pipe, o: sdpa(pipe, o.attention)),
    Step("compile", "torch.compile", "04_compile", _compile),
    Step("fused_qkv", "fused projections", "05_fused_qkv", lambda pipe, o: fuse_qkv(pipe)),
    Step("int8", "dynamic int8", "06_int8", lambda pipe, o: int8(pipe, o.int8_anyway)),
    Step("tiny_vae", "tiny VAE", "07_tiny_vae", lambda pipe, o: tiny_vae(pipe, o.tiny_vae)),
    Step("dpm_20", "DPM++ 2M, 20 steps", "08_dpm_20", lambda pipe, o: use_scheduler(pipe, "dpm"), _twenty),
    Step("cfg_cutoff", "guidance cut off", "09_cfg_cutoff", call_kwargs=lambda pipe, o: cutoff(pipe, o.cutoff)),
)

NUMBERS = {step.id: n for n, step in enumerate(STEPS, 1)}


def step_before(i: str) -> str | None:
    """The id of the step taught before step `i`; None for the first, and for a row that is no step."""
    n = NUMBERS.get(i, 1)
    return STEPS[n - 2].id if n > 1 else None


# What is compiled must be final, what is quantised must be fused before, and only what stays need be fused. The last
# step changes the call alone and has no place here.
ORDER = ("baseline_fp32", "bf16", "sdpa", "tiny_vae", "fused_qkv", "int8", "dpm_20", "compile")

# What brought nothing on recorded hardware, by what its name or "cpu" matches: see figures/data/<machine>/*-path.json.
BRINGS_NOTHING = {
    r"\b(H100|H200|GH200|H20|H800)\b": ("int8",),
    r"^cpu$": ("fused_qkv", "int8"),
}


def worthwhile(gpu: str | None = None) -> tuple[str, ...]:
    """The ids of the steps worth taking on `gpu`, in taught order: all, less what brought nothing on such hardware.

    `gpu` is a name as `torch.cuda.get_device_name()` gives it, "cuda" the GPU of this machine, "cpu" none, None
    whichever this machine has. On hardware that is not on record every step is worth a try.
    Raises UserError for what is no name. Introduced in notebooks/10_the_whole_path.
    """
    gpu = _named(gpu)
    out = {i for pattern, ids in BRINGS_NOTHING.items() if re.search(pattern, gpu) for i in ids}
    return tuple(i for i in NUMBERS if i not in out)


def _named(gpu):
    """The name of a GPU, or "cpu"."""
    if gpu is not None and not (isinstance(gpu, str) and gpu):
        raise UserError(f'gpu is {gpu!r}: give its name, "cuda", "cpu" or None')
    if gpu is None or re.fullmatch(r"cuda(:\d+)?", gpu, re.IGNORECASE):
        return torch.cuda.get_device_name(gpu and gpu.lower()) if torch.cuda.is_available() else "cpu"
    return "cpu" if gpu.lower() == "cpu" else gpu


@dataclass(frozen=True)
class Recommendation:
    """What `prepare` can be given in place of ids: steps, whether on our engine, and how is sampled (see `sampling`)."""

    steps: tuple[str, ...]
    engine: bool = False
    scheduler: str | None = None
    num_steps: int | None = None
    start: float = 0.0
    stop: float = 1.0


# What `levels` makes of figures/data/nvidia-h200/pocket-quality.json: how each level samples (the rows it recommends are all
# on the engine), and the steps whose rows alone are not lossless.
LEVELS = {
    "lossless": {},
    "balanced": {"scheduler": "euler_ancestral", "num_steps": 8},
    "fastest": {"scheduler": "euler", "num_steps": 4},
}
LOSSY = ("tiny_vae", "dpm_20", "cfg_cutoff")


def recommended(level: str = "lossless", gpu: str | None = None) -> Recommendation:
    """What to do to a pipeline for a level of quality, by what pocket's study measured: `prepare` takes it.

    "lossless": no more drift from fp32 than rounding to bf16 makes, adherence unchanged. "balanced" and "fastest": at most
    2 % and 10 % of the objects, and of the relations, lost (see `levels.qualifying`). On a CUDA GPU all are drawn by the
    engine, on a CPU by the steps worth taking there that lose nothing. `gpu` as in `worthwhile`.
    What is lossless changes rounding alone, and should carry over to other models, which was not measured. How few steps do
    is pocket's own: it draws three solids, and another model needs more.
    Raises UserError for another level, and as `worthwhile` does. Introduced in notebooks/10_the_whole_path.
    """
    if level not in tuple(LEVELS):
        raise UserError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    if _named(gpu) != "cpu":
        return Recommendation(("bf16", "sdpa"), engine=True, **LEVELS[level])
    return Recommendation(tuple(i for i in worthwhile(gpu) if i not in LOSSY), **LEVELS[level])


def sampling(pipe, scheduler: str | None = None, num_steps: int | None = None, start: float = 0.0, stop: float = 1.0) -> dict:
    """Give `pipe` another scheduler, made from its own; returns the call's keywords for `num_steps` and for guidance.

    `scheduler` None: its own again, that is the one it had when this was called first, or that it was given since by other
    means. `num_steps` None leaves the call its number; guided is from `start` to `stop`, shares of the steps (0 and 1: all;
    0 and 0: never). Raises UserError, before anything changes, for another scheduler, for no whole number of steps, and as
    `cutoff` and `interval` do. Introduced in notebooks/10_the_whole_path.
    """
    call_kwargs = _call(pipe, scheduler, num_steps, start, stop)
    own, given = getattr(pipe, "_sdopt_schedulers", (None, None))
    if pipe.scheduler is not given:
        own = pipe.scheduler
    pipe.scheduler = own
    if scheduler:
        start_at_step_zero(use_scheduler(pipe, scheduler))
    pipe._sdopt_schedulers = own, pipe.scheduler
    return call_kwargs


def _call(pipe, scheduler, num_steps, start, stop):
    if scheduler is not None and scheduler not in tuple(SCHEDULERS):
        raise UserError(f"unknown scheduler {scheduler!r}: choose one of {', '.join(SCHEDULERS)}, or None")
    if num_steps is not None:
        _check_steps(num_steps)
    if not all(isinstance(share, Real) for share in (start, stop)):
        raise UserError(f"guidance from {start!r} to {stop!r} is no interval: give shares of the steps, from 0 to 1")
    steps = {} if num_steps is None else {"num_inference_steps": num_steps}
    return (interval(pipe, start, stop) if start else cutoff(pipe, stop)) | steps


def _check_steps(steps):
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
        raise UserError(f"{steps} steps draw no picture: use 1 or more, a whole number")


def prepare(pipe, ids, **options):
    """Apply the steps `ids` to a stock pipeline, whatever their order here; returns (pipe, call_kwargs).

    A picture is then `pipe(prompt, **call_kwargs)`. `options` are the fields of `Options`. Steps the pipeline carries
    already are not applied again; there is no way back but to load it again. In place of ids: a level of `recommended`, for the
    device that the pipeline is on, or what `recommended` returned.
    Raises UserError for an unknown step or option, for an option out of range, for a step that had to come before one
    the pipeline carries, when a step cannot be applied, and when a recommendation meets a pipeline it is not for. Introduced
    in notebooks/10_the_whole_path.
    """
    if isinstance(ids, str):
        if ids in NUMBERS:
            raise UserError(f"'{ids}' is one step: give a list of steps, [\"{ids}\"]")
        ids = recommended(ids, str(pipe.device))
    if isinstance(ids, Recommendation):
        return _recommended(pipe, ids, options)
    if not isinstance(ids, Iterable):
        raise UserError(f"{ids!r} is no list of steps: give their ids, a level, or what path.recommended() returns")
    ids, known = tuple(ids), {step.id: step for step in STEPS}
    for unknown in (i for i in ids if i not in known):
        raise UserError(f"unknown step '{unknown}': choose from {', '.join(known)}")
    names = [field.name for field in fields(Options)]
    for unknown in (name for name in options if name not in names):
        raise UserError(f"unknown option '{unknown}': choose from {', '.join(names)}")
    o = Options(**options)
    _check_steps(o.steps)
    if not isinstance(o.compiler, dict):
        raise UserError(f"compiler is {o.compiler!r}: give the keywords of compile_pipeline as a dict")
    applied = getattr(pipe, "_sdopt_steps", ())
    new = [i for i in ORDER if i in ids and i not in applied]
    for i in new:
        after = [other for other in applied if ORDER.index(other) > ORDER.index(i)]
        if after:
            raise UserError(
                f"'{i}' comes before '{after[0]}', which this pipeline carries: load it again and prepare it once"
            )
    call_kwargs = {}
    for step in STEPS:
        if step.id in ids:
            call_kwargs |= step.call_kwargs(pipe, o)
    for i in new:
        known[i].apply(pipe, o)
        pipe._sdopt_steps = applied = (*applied, i)
    return pipe, call_kwargs


def _recommended(pipe, choice, options):
    """As `prepare`; what can be refused is, before anything changes."""
    carried = [i for i in getattr(pipe, "_sdopt_steps", ()) if i not in choice.steps and i in LOSSY]
    if carried:
        raise UserError(f"the pipeline carries '{carried[0]}', which this leaves out: load it again")
    if choice.engine and pipe.device.type != "cuda":
        raise UserError('chosen for a CUDA GPU: call pipe.to("cuda") first, or path.recommended(level, gpu="cpu")')
    if choice.engine and compiled_parts(pipe.unet):
        raise UserError("the pipeline is compiled, which is another way to what the engine does: load it again")
    sampled = choice.scheduler, choice.num_steps, choice.start, choice.stop
    _call(pipe, *sampled)
    pipe, call_kwargs = prepare(pipe, choice.steps, **options)
    if choice.engine:
        engine.prepare(pipe)
    return pipe, call_kwargs | sampling(pipe, *sampled)
