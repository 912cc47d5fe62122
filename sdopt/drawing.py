"""One drawing task for every row that is compared: the same prompts, seeds and noise; drawn, timed, looked at."""

from dataclasses import dataclass

import numpy as np
import torch

from sdopt import timing
from sdopt.models import Model
from sdopt.pocket.captions import test_prompts

STEP_NOISE = 1_000_000  # an ancestral sampler's noise has seeds of its own: the latents' would give the latents again


@dataclass(frozen=True)
class Task:
    """What every row of a comparison draws. `prompts` and `seeds`: one tuple a timed call, each as long as the batch."""

    height: int
    width: int
    steps: int
    guidance_scale: float
    prompts: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[int, ...], ...]
    scenes: tuple | None = None  # pocket: what each prompt describes, which the oracle can look for


def task(model: Model, runs: int = 3) -> Task:
    """The task of a model's notebooks: `runs` calls of one picture, with seeds 0, 1, 2 and so on.

    pocket draws another test prompt at every call, the same ones each time; sd15 and sdxl draw their one prompt.
    Introduced in notebooks/00_measure_first.
    """
    subjects = test_prompts(runs) if model.name == "pocket" else None
    texts = [s.text for s in subjects] if subjects else [model.prompt] * runs
    return Task(
        height=model.height,
        width=model.width,
        steps=model.steps,
        guidance_scale=model.guidance_scale,
        prompts=tuple((text,) for text in texts),
        seeds=tuple((seed,) for seed in range(runs)),
        scenes=tuple((s.text, s.scene) for s in subjects) if subjects else None,
    )


def noise(pipe, height, width, seeds):
    """The latents a picture starts from, [len(seeds), channels, height/8, width/8] in the UNet's dtype and device.

    Drawn in fp32 on the CPU and then cast, so that every row starts from the same noise whatever its dtype and device.
    Introduced in notebooks/02_bf16.
    """
    shape = (pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    drawn = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return drawn.to(pipe.device, pipe.unet.dtype)


def drawer(pipe, task, **call_kwargs):
    """A function `draw(run=0, output_type="pil")` that draws the task's run: a list of pictures, one a prompt.

    `call_kwargs`, a step's own, win over the task's settings. The noise is drawn here, once, and not in the time of a
    call. Introduced in notebooks/00_measure_first.
    """
    latents = [noise(pipe, task.height, task.width, seeds) for seeds in task.seeds]
    arguments = {"num_inference_steps": task.steps, "guidance_scale": task.guidance_scale} | call_kwargs

    def draw(run=0, output_type="pil"):
        return pipe(
            list(task.prompts[run]),
            height=task.height,
            width=task.width,
            latents=latents[run],
            generator=[torch.Generator(pipe.device).manual_seed(STEP_NOISE + s) for s in task.seeds[run]],
            output_type=output_type,
            **arguments,
        ).images

    return draw


def measure(pipe, task, tell=lambda phase: None, **call_kwargs):
    """Draw the task and time it; returns (numbers, pictures).

    numbers: {"latency_s", "first_call_s", "peak_memory_bytes", "peak_memory_of", "stages_ms"}, a row's as in a result
    file. pictures: one list of PIL images a run. `tell(phase)` hears what is under way.
    Raises ArithmeticError when a picture holds values that are not finite. Introduced in notebooks/00_measure_first.
    """
    draw = drawer(pipe, task, **call_kwargs)
    runs, cuda = len(task.prompts), pipe.unet.device.type == "cuda"
    # the calls that warm up draw what the first run draws, with the shapes of all others
    turns = iter([0] * (1 + timing.SETTLING_CALLS * cuda) + [*range(runs)])
    drawn = []
    tell("first call")
    timed = timing.measure(lambda: drawn.append(draw(next(turns))), runs, pipe.unet.device.type)
    tell("stages")
    finite = []
    stages = timing.stages(pipe, lambda: finite.append(np.isfinite(draw(0, "np")).all()))
    if not all(finite):
        raise ArithmeticError("the picture holds values that are not finite")
    latency = {"median": timed.median, "p20": timed.p20, "p80": timed.p80, "runs": list(timed.runs_s)}
    return {
        "latency_s": latency,
        "first_call_s": timed.first_call_s,
        "peak_memory_bytes": timed.peak_memory_bytes,
        "peak_memory_of": timed.peak_memory_of,
        "stages_ms": stages,
    }, drawn[-runs:]
