"""One drawing task for every row that is compared: the same prompts, seeds and noise; drawn, timed, looked at."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from sdopt import timing
from sdopt.models import Model
from sdopt.pocket.captions import test_prompts

LONG_S = 2.0  # seconds of a call that tells its own stages on a GPU
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


def gallery(model: Model, asked, batch: int, seed: int = 0) -> Task:
    """The task of one picture for each of the prompts `asked`, `batch` of them a call: prompt i starts from seed + i.

    The same pictures whatever the batch, up to rounding. `asked`: `captions.Prompt`s.
    """
    chunks = [range(start, min(start + batch, len(asked))) for start in range(0, len(asked), batch)]
    return Task(
        height=model.height,
        width=model.width,
        steps=model.steps,
        guidance_scale=model.guidance_scale,
        prompts=tuple(tuple(asked[k].text for k in chunk) for chunk in chunks),
        seeds=tuple(tuple(seed + k for k in chunk) for chunk in chunks),
        scenes=tuple((prompt.text, prompt.scene) for prompt in asked),
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


def measure(pipe, task, tell=lambda phase: None, during=nullcontext(), settling=None, **call_kwargs):
    """Draw the task and time it; returns (numbers, pictures).

    numbers: {"latency_s", "first_call_s", "peak_memory_bytes", "peak_memory_of", "stages_ms"}, a row's as in a result
    file, and on a GPU "memory_bytes" (see `timing.Timing`). pictures: one list of PIL images a run. The stages are those of
    the last timed call on a CPU, and on a GPU where one takes LONG_S: their marks, and a pause of Python's, do not show in it.
    Elsewhere they are medians of more calls.
    `tell(phase)` hears what is under way; the timed calls are made within `during`. `settling`: keywords of the untimed calls
    between the first and the timed ones, where they need not draw a whole picture.
    Raises ArithmeticError when latents or a picture hold values that are not finite. Introduced in
    notebooks/00_measure_first.
    """
    draw = drawer(pipe, task, **call_kwargs)
    cuda, runs = pipe.unet.device.type == "cuda", len(task.prompts)
    settle = timing.SETTLING_CALLS if is_compiled(pipe) else 1
    warm = drawer(pipe, task, **call_kwargs | settling) if settling else draw
    turns = [(draw, 0)] + [(warm, 0)] * (settle * cuda) + [(draw, run) for run in range(runs)]
    drawn, stages, took = [], {}, 0.0

    def draw_next():
        nonlocal took
        how, run = turns[len(drawn)]
        start, draw_it = time.perf_counter(), lambda: drawn.append(how(run))
        if len(drawn) == len(turns) - 1 and (not cuda or took >= LONG_S):
            stages.update(timing.stages(pipe, lambda: all_finite(pipe, draw_it)))
        else:
            draw_it()
        took = time.perf_counter() - start

    tell("first call")
    timed = timing.measure(draw_next, runs, pipe.unet.device.type, settle, during)
    if not stages:
        tell("stages")
        stages = timing.stages(pipe, lambda: all_finite(pipe, draw), timing.STAGE_CALLS)
    memory = {"memory_bytes": timed.memory_bytes} if timed.memory_bytes else {}
    return {
        "latency_s": timing.latency(timed.runs_s),
        "first_call_s": timed.first_call_s,
        "peak_memory_bytes": timed.peak_memory_bytes,
        "peak_memory_of": timed.peak_memory_of,
        "stages_ms": stages,
        **memory,
    }, drawn[-runs:]


def pictures(pipe, task, **call_kwargs):
    """Draw all of the task, one call after another: yields (pictures, latents) of each.

    pictures: uint8 [batch, 3, H, W] on the pipeline's device, rounded as a pipeline does for PIL; latents: what the VAE
    decoded, float32 [batch, 4, h, w]. `call_kwargs` as in `drawer`. Raises ArithmeticError as `all_finite` does.
    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    draw = drawer(pipe, task, **call_kwargs)
    for run in range(len(task.prompts)):
        with _decoded(pipe) as seen:
            drawn = draw(run, "pt")
        yield (drawn.float() * 255).round().to(torch.uint8), torch.cat([latents for latents, _ in seen]).float()


def all_finite(pipe, draw):
    """Draw once more; raises ArithmeticError unless all latents and all that the VAE made of them are finite.

    The picture itself would not tell: a pipeline clips it to what a screen can show, infinity as well.
    """
    with _decoded(pipe):
        draw()


@contextmanager
def _decoded(pipe):
    """Within, what the VAE decodes is kept: a list of (latents, whether these and what became of them are finite)."""
    decode, seen = pipe.vae.decode, []

    def decode_and_look(latents, *args, **kwargs):
        decoded = decode(latents, *args, **kwargs)
        seen.append((latents, latents.isfinite().all() & decoded[0].isfinite().all()))
        return decoded

    with timing.swapped(pipe.vae, "decode", decode_and_look):
        yield seen
    if not all(finite for _, finite in seen):
        raise ArithmeticError("latents or picture hold values that are not finite")


def is_compiled(pipe) -> bool:
    """Whether torch.compile has been asked for the UNet or the VAE, or for parts of them."""
    return any(timing.compiled_parts(model) for model in (pipe.unet, pipe.vae))
