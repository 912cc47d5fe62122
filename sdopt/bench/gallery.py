"""What happens in the process of a quality study: a pipeline is prepared once, then row after row timed, drawn and judged."""

import io
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdopt import compilation, drawing, models, path, quality, records, results, timing
from sdopt.bench import claims, sensors
from sdopt.bench.process import RowFailed
from sdopt.bench.row import as_run, prepare
from sdopt.bench.sweeps import REFERENCE
from sdopt.pocket.oracle import load_oracle
from sdopt.pocket.renderer import render

PICTURES = "pictures"  # the phase after all that is timed
AT_ONCE = {"cuda": 256, "cpu": 8}  # pictures a call
RENDERED = {"cuda": 128, "cpu": 4}
SETTLING = {"num_inference_steps": 2}  # of calls that warm up: every shape is met, on both sides of a cutoff
ENOUGH = 256  # pictures for a Frechet distance: of fewer than the 128 features, a covariance says nothing
SHEET, SIDE = 24, 64  # the reference's first pictures, and how small they are kept for people to see


@dataclass(frozen=True)
class Shelf:
    """Where the processes of a study leave things for each other: the reference's pictures, the renders' features."""

    folder: Path

    @property
    def pictures(self):
        return self.folder / "pictures.npy"

    @property
    def latents(self):
        return self.folder / "latents.npy"

    @property
    def real(self):
        return self.folder / "real.npy"

    def put(self, target, array):
        file = io.BytesIO()
        np.save(file, array)
        results.write_whole(target, file.getbuffer())


def begin(state, tell, job):
    """Load and prepare the pipeline of `job`, for the rows that share it; returns the seconds it took."""
    start = time.perf_counter()
    pipe, _ = prepare(job, tell)
    state |= {"pipe": pipe, "scheduler": pipe.scheduler, "drawn": None}
    return time.perf_counter() - start


def real(state, tell, device, asked, shelf):
    """Render the scenes of the prompts `asked`, and keep what the oracle makes of them: [len(asked), 128].

    Not compiled: thousands of renders take less time than the compiler would.
    """
    tell("renders")
    scenes, at_once = [prompt.scene for prompt in asked], RENDERED[device]
    oracle, features = load_oracle().to(device), []
    for start in range(0, len(scenes), at_once):
        with _exactly():
            rendered = render(scenes[start : start + at_once], device=device, compiled=False)
            features.append(oracle.features(rendered).cpu())
    shelf.put(shelf.real, torch.cat(features).numpy())


def compile_ahead(state, tell, jobs, asked=()):
    """Leave in the compiler's cache what the rows `jobs` of one pipeline will look for: graphs for a call, or one of all `asked`.

    Returns {row id: {"cold_s", "compiled", "found"}} of those that compiled: seconds of the call, less what it waited for others
    that timed kernels, and its graphs.
    """
    begin(state, tell, jobs[0])
    pipe, first = state["pipe"], {}
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False), _in_turn(jobs[0]) as search:
        for job in jobs:
            call, before = sampling(pipe, state["scheduler"], job.recipe), compilation.graphs_so_far()
            task = _task(job, asked, pipe.device.type) if asked else job
            draw, waited = drawing.drawer(pipe, task, **call | (SETTLING if asked else {})), sum(search.waited)
            seconds = timing.seconds_of(lambda draw=draw: draw(0, "pt"), job.device) - (sum(search.waited) - waited)
            if (graphs := _graphs_since(before))["compiled"]:
                first[job.recipe.id] = {"cold_s": seconds} | graphs
    return first


def _in_turn(job):
    """Within, what a compiler times beside other processes is timed while no other times anything; it searches nothing else."""
    beside = str(job.device).startswith("cuda") and job.cache
    return claims.applied(claims.LATER, job.claims) if beside else claims.applied(claims.ALONE, None)


def _graphs_since(before):
    return {key: n - before[key] for key, n in compilation.graphs_so_far().items()}


def measure(state, tell, job, asked, shelf):
    """After `begin`: time the row of `job`, then draw and judge its pictures; returns its numbers and what `judge` does."""
    numbers, call = timed(state, tell, job)
    tell(PICTURES)
    start = time.perf_counter()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        judged = judge(state["pipe"], job, asked, shelf, call)
    numbers["took_s"]["pictures"] = time.perf_counter() - start
    return numbers, *judged


def timed(state, tell, job):
    """After `begin`: time the row of `job`; returns its numbers and the keywords of its call.

    Graphs are compiled for each size as such, not for any size.
    """
    recipe, pipe = job.recipe, state["pipe"]
    call = sampling(pipe, state["scheduler"], recipe)
    seen, before, start = {}, compilation.graphs_so_far(), time.perf_counter()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        numbers, _ = drawing.measure(pipe, job, tell, sensors.watch(job.device, seen), SETTLING, **call)
    took = {"timing": time.perf_counter() - start}
    numbers |= {"as_run": as_run(pipe) | {"peak_memory_of": numbers.pop("peak_memory_of")}, "took_s": took}
    numbers |= {"warm_from": state["drawn"]} if state["drawn"] else {}  # its first call found all of that row's kernels
    numbers |= {"gpu": seen} if seen else {}
    if recipe.compiles:
        numbers["graphs"] = _graphs_since(before)
    state["drawn"] = state["drawn"] or recipe.id
    return numbers, call


def sampling(pipe, own, recipe):
    """Give `pipe` the scheduler of `recipe`, made from the model's `own`; returns the keywords of a call."""
    pipe.scheduler = own
    return path.sampling(pipe, recipe.scheduler, recipe.num_steps, recipe.start, recipe.stop)


def judge(pipe, job, asked, shelf, call):
    """Draw a picture for each of the prompts `asked` by `call`; returns their record and Frechet distance.

    The reference leaves its pictures on the shelf, the others compare with them. They are drawn many a call, which
    changes their rounding and no more. The distance is None for fewer than ENOUGH. Raises RowFailed where there is
    nothing to compare with.
    """
    recipe, device = job.recipe, pipe.device.type
    if recipe.compares and not shelf.pictures.exists():
        raise RowFailed(f"there are no pictures to compare with: {REFERENCE} was not drawn")
    others = [np.load(file, mmap_mode="r") for file in (shelf.pictures, shelf.latents)] if recipe.compares else []
    task = _task(job, asked, device)
    oracle = load_oracle().to(device)
    agreements, features, drift, drawn, done = [], [], {}, [], 0
    for images, latents in drawing.pictures(pipe, task, **call):
        part = slice(done, done := done + len(images))
        with _exactly():
            agreements += quality.agreements(task.scenes[part], images)
            features.append(oracle.features(images))
            if recipe.compares:
                theirs = (torch.from_numpy(other[part].copy()).to(device) for other in others)
                paired = quality.paired(images, latents, *theirs)
                drift = {name: drift.get(name, []) + values for name, values in paired.items()}
        if recipe.id == REFERENCE:
            drawn.append((images.cpu(), latents.cpu()))
    if drawn:
        _keep(shelf, *(torch.cat(parts).numpy() for parts in zip(*drawn, strict=True)))
    distance = None
    if len(asked) >= ENOUGH:
        distance = quality.frechet(torch.cat(features), torch.from_numpy(np.load(shelf.real)).to(device))
    return records.of(agreements, drift), distance


def _task(job, asked, device):
    task = drawing.gallery(models.model(job.model), asked, AT_ONCE[device], job.recipe.seed)
    return replace(task, height=job.height, width=job.width, steps=job.steps, guidance_scale=job.guidance_scale)


def _keep(shelf, images, latents):
    """Leave the reference for the other rows; the pictures last, for where they are all is there."""
    results.write_whole(shelf.folder.with_name("reference.png"), results.png(sheet(images)))
    shelf.put(shelf.latents, latents)
    shelf.put(shelf.pictures, images)


def sheet(images):
    """The first pictures of uint8 [N, 3, H, W], small, in lines of six: a PIL image."""
    small = [Image.fromarray(image.transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    small = small[:SHEET]
    page = Image.new("RGB", (6 * SIDE, -(-len(small) // 6) * SIDE))
    for k, picture in enumerate(small):
        page.paste(picture, (k % 6 * SIDE, k // 6 * SIDE))
    return page


@contextmanager
def _exactly():
    """Within, convolutions do not round to TF32: SSIM takes small differences of large numbers."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
