"""A throughput study: the engine with more and more pictures at once, by pictures a second and by what the GPU can multiply.

`sdxl-throughput` is the work of MLPerf Inference's SDXL benchmark (20 steps of Euler, guidance 8, 1024x1024), on random weights
and one prompt, and without its harness, its 5,000 captions and its quality gate: not an MLPerf result. A call is a batch of
prompts to as many pictures, uint8 in the host's memory; text encoders and VAE included, the latter a picture at a time.

How long it takes on an H200: 16 minutes. 127 pictures over the seven batches, five times each, are 320 s in bf16 and 240 in fp8,
and a process a row, with its first call, its products and its capture, some 27 s.
"""

from functools import partial
from pathlib import Path

import torch

from sdopt import drawing, quantization, roofline, timing
from sdopt.bench import process, sensors
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.row import as_run, drawn_with, prepare
from sdopt.bench.walk import LIMIT_S, job_of, timed

SIDE = {"cuda": 8192, "cpu": 512}  # of the square products that are the ceiling


def by_batch(
    shared, recipes, device, out, progress=lambda done, text: None, order=None, retry=False, limit_s=LIMIT_S, study=None
):
    """Measure the rows `recipes`, each with the batch in its settings; returns the result, written to `out` after every row.

    `order`: the ids of all rows the file may hold, None: these. Rows that `out` has are kept (with `retry` those that
    failed are not). A row that fails, for want of memory say, is recorded and the study goes on.
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, study = Path(out), study or f"{shared['model']}-throughput"
    order = order or [recipe.id for recipe in recipes]
    with alone(out), process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
        about = head(study, shared, device, Judge(shared).prompts, "bench")
        ledger = Ledger(out / f"{study}.json", about, order, True, retry)
        todo = [recipe for recipe in recipes if not ledger.is_done(recipe.id)]
        for done, recipe in enumerate(todo, len(recipes) - len(todo)):
            batch = recipe.settings["batch"]
            job = job_of(recipe, shared, Judge(shared | {"batch": batch}), device)
            tell = partial(lambda done, i, phase: progress(done, f"{i}: {phase}"), done, recipe.id)
            row = ledger.begun(recipe)
            try:
                numbers = fresh.call(measure, job, on_phase=tell, limit_s=limit_s)
                row |= timed(row, numbers, job) | {"status": "ok"}
                row["rate"] = rate(row, batch)
            except process.RowFailed as failure:
                row |= {"status": f"failed: {failure}"}
            ledger.put(row)
    return ledger.result


def rate(row, batch):
    """What a row comes to: pictures a second, and trillions of operations."""
    pictures = batch / row["latency_s"]["median"]
    return {"images_per_s": pictures, "tflops": pictures * row["flops_a_picture"] / 1e12}


def measure(state, tell, job):
    """Measure `job` in a process of its own: calls that end with pictures in the host's memory; returns the row's numbers."""
    pipe, call = prepare(job, tell)
    cuda, seen = pipe.device.type == "cuda", {}
    draw = drawing.drawer(pipe, job, **call)
    tell("first call")
    first = timing.seconds_of(lambda: pixels(draw, 0), job.device)
    tell("stages")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stages = timing.stages(pipe, lambda: drawing.all_finite(pipe, lambda: pixels(draw, 0)))
    tell("timed calls")
    with sensors.watch(job.device, seen):
        runs = [timing.seconds_of(partial(pixels, draw, run), job.device) for run in range(len(job.prompts))]
    peak, memory_of, counted = timing.peak_memory(cuda)
    tell(process.PROFILING)
    numbers = {
        "latency_s": timing.latency(runs),
        "first_call_s": first,
        "peak_memory_bytes": peak,
        "stages_ms": stages,
        "flops_a_picture": flops(pipe, job),
        "drawn_with": drawn_with(pipe, job, call),
        "as_run": as_run(pipe) | {"peak_memory_of": memory_of},
    }
    del draw, pipe
    if cuda:
        torch.cuda.empty_cache()  # a large batch leaves little room
    numbers |= ({"memory_bytes": counted} if counted else {}) | ({"gpu": seen} if seen else {})
    return numbers | {"ceiling_tflops": ceiling(job.device)}


def pixels(draw, run):
    """Pictures as uint8 [batch, 3, H, W] in the host's memory, rounded as a pipeline does for PIL."""
    return (draw(run, "pt").float() * 255).round().to(torch.uint8).cpu()


def flops(pipe, task):
    """Operations of one guided picture, two to a multiplication: products, convolutions and attention of UNet and decoder.

    Counted from shapes, on models without weights. Text encoders are left out, a few thousandths of the whole.
    """
    with torch.device("meta"):
        unet, vae = (type(model).from_config(model.config) for model in (pipe.unet, pipe.vae))
        height, width = task.height // pipe.vae_scale_factor, task.width // pipe.vae_scale_factor
        latents = torch.empty(2, unet.config.in_channels, height, width)
        text = torch.empty(2, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)
        added, embedded = {}, unet.config.projection_class_embeddings_input_dim
        if embedded:
            pooled = embedded - 6 * unet.config.addition_time_embed_dim
            added = {"time_ids": torch.empty(2, 6), "text_embeds": torch.empty(2, pooled)}
        step = _counted(lambda: unet(latents, torch.empty(()), text, added_cond_kwargs=added))
        return task.steps * step + _counted(lambda: vae.decode(latents[:1]))


@torch.no_grad()
def _counted(call):
    return sum(roofline.totals(roofline.count(call))["flops"].values())


def ceiling(device):
    """Trillions of operations a second of a square product: {"bfloat16"} and, where the GPU has it, {"fp8"}."""
    side, formats = SIDE[torch.device(device).type], ("bfloat16", *("fp8",) * quantization.has_fp8(device))
    return {name: 2e-12 * side**3 / roofline.product_seconds(name, side, device, repeats=5, rounds=15) for name in formats}
