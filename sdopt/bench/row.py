"""What happens in the process of one row: load, prepare, time, look."""

import os
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
import transformers

from sdopt import compilation, models, path, schedulers, timing
from sdopt.bench.process import RowFailed
from sdopt.errors import UserError

STEP_NOISE = 1_000_000  # an ancestral sampler's noise has seeds of its own: the latents' would give the latents again


@dataclass(frozen=True)
class Job:
    """One row to measure. `prompts` and `seeds`: one list a timed run, each as long as the batch."""

    model: str
    weights: str
    device: str
    ids: tuple[str, ...]
    height: int
    width: int
    steps: int
    guidance_scale: float
    scheduler: str
    prompts: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[int, ...], ...]
    options: dict = field(default_factory=dict)
    channels_last: bool = False  # the layout alone, which the compile step changes too


def measure(job, tell):
    """Measure `job`, telling its phases; returns the row's numbers and its images (uint8 arrays, one list a run)."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = models.load(job.model, job.weights, job.device)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe, call_kwargs = path.prepare(pipe, job.ids, **job.options)
    except UserError as error:  # this step cannot be applied here; the others may
        raise RowFailed(str(error)) from error
    if job.channels_last:
        compilation.channels_last(pipe)
    arguments = {"num_inference_steps": job.steps, "guidance_scale": job.guidance_scale} | call_kwargs
    latents = [noise(pipe, job.height, job.width, seeds) for seeds in job.seeds]

    def draw(run, output_type="pil"):
        return pipe(
            list(job.prompts[run]),
            height=job.height,
            width=job.width,
            latents=latents[run],
            generator=[torch.Generator(job.device).manual_seed(STEP_NOISE + s) for s in job.seeds[run]],
            output_type=output_type,
            **arguments,
        ).images

    runs = len(job.prompts)
    cuda = job.device == "cuda"
    # the calls that warm up draw what the first run draws, with the shapes of all others
    turns = iter([0] * (1 + timing.SETTLING_CALLS * cuda) + [*range(runs)])
    drawn = []
    tell("first call, which compiles" if "compile" in job.ids else "first call")
    timed = timing.measure(lambda: drawn.append(draw(next(turns))), runs, job.device)
    tell("stages")
    finite = []
    stages = timing.stages(pipe, lambda: finite.append(np.isfinite(draw(0, "np")).all()))
    if not all(finite):
        raise ArithmeticError("the picture holds values that are not finite")
    return {
        "latency_s": {"median": timed.median, "p20": timed.p20, "p80": timed.p80, "runs": list(timed.runs_s)},
        "first_call_s": timed.first_call_s,
        "peak_memory_bytes": timed.peak_memory_bytes,
        "stages_ms": stages,
        "drawn_with": {
            "steps": arguments["num_inference_steps"],
            "guidance_scale": arguments["guidance_scale"],
            "scheduler": next(i for i, (cls, _) in schedulers.SCHEDULERS.items() if type(pipe.scheduler) is cls),
        },
        "as_run": as_run(pipe) | {"peak_memory_of": timed.peak_memory_of},
    }, [[np.asarray(image) for image in images] for images in drawn[-runs:]]


def noise(pipe, height, width, seeds):
    """The latents a picture starts from, [len(seeds), channels, height/8, width/8] in the UNet's dtype and device.

    Drawn in fp32 on the CPU and then cast, so that every row starts from the same noise whatever its dtype and device.
    """
    shape = (pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    drawn = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return drawn.to(pipe.device, pipe.unet.dtype)


def as_run(pipe):
    """The switches a reader would ask about, as they stood while the row ran."""
    return {
        "unet_dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "vae_dtype": str(pipe.vae.dtype).removeprefix("torch."),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "omp_spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "compiled": compilation.compiled_kind(pipe),
    }
