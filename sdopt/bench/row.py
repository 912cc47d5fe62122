"""What happens in the process of one row: load, prepare, time, look."""

import os
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
import transformers

from sdopt import compilation, drawing, models, path, schedulers
from sdopt.bench.process import RowFailed
from sdopt.errors import UserError


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
    numbers, pictures = drawing.measure(
        pipe,
        job,
        lambda phase: tell(phase + (", which compiles" * (phase == "first call" and "compile" in job.ids))),
        **call_kwargs,
    )
    memory_of = numbers.pop("peak_memory_of")
    return numbers | {
        "drawn_with": {
            "steps": call_kwargs.get("num_inference_steps", job.steps),
            "guidance_scale": call_kwargs.get("guidance_scale", job.guidance_scale),
            "scheduler": next(i for i, (cls, _) in schedulers.SCHEDULERS.items() if type(pipe.scheduler) is cls),
        },
        "as_run": as_run(pipe) | {"peak_memory_of": memory_of},
    }, [[np.asarray(image) for image in images] for images in pictures]


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
