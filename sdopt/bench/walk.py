"""The path study: the nine steps in taught order, each row in a fresh process, judged by speed, memory and picture."""

import io
import shutil
from pathlib import Path

from PIL import Image

from sdopt import models, path, quality, results
from sdopt.bench import notes, process
from sdopt.bench.row import Job, measure
from sdopt.errors import UserError
from sdopt.pocket.captions import test_prompts

BASELINE = path.STEPS[0].id
NUMBERS = {step.id: n for n, step in enumerate(path.STEPS, 1)}
LIMIT_S = 3600.0
SHARED = ("model", "weights", "height", "width", "steps", "guidance_scale", "scheduler")
NEEDED_BYTES = 64 * 2**20


def settings(name, weights=None, height=None, width=None, steps=None, batch=1, runs=5):
    """The settings every row shares: the model's own, with what is given instead. Raises UserError for bad ones."""
    model = models.model(name)
    for option, value in (("steps", steps), ("batch", batch), ("runs", runs)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value} is too few: use 1 or more")
    height = model.height if height is None else height
    width = model.width if width is None else width
    models.check_size(height, width)
    return {
        "model": name,
        "weights": weights or model.weights,
        "height": height,
        "width": width,
        "steps": steps or model.steps,
        "guidance_scale": model.guidance_scale,
        "batch": batch,
        "scheduler": model.scheduler,
        "seed": 0,
        "prompt": test_prompts(1)[0].text if name == "pocket" else model.prompt,
        "runs": runs,
    }


def rows_to_measure(out, device, only=None, cutoff=0.4):
    """The ids of the rows a walk measures, in order: all, or those in `only` (each still applies all steps before it).

    Raises UserError for an absent device, a step or a cutoff there is none of, or an `out` that cannot be written to.
    """
    models.check_device(device)
    if not 0 <= cutoff <= 1:
        raise UserError(f"--cutoff {cutoff:g} is outside [0, 1]: it is the share of the steps that are guided")
    unknown = [i for i in only or () if i not in NUMBERS]
    if unknown:
        raise UserError(f"unknown step '{unknown[0]}': choose from {', '.join(NUMBERS)}")
    _check_room(Path(out))
    return [i for i in NUMBERS if only is None or i in only]


def walk(shared, ids, device, out, cutoff=0.4, progress=lambda done, text: None):
    """Measure the rows `ids` with the `shared` settings; returns the result, written to `out` after every row.

    `progress(done, text)` is told how many rows are done and what is under way, once the model has loaded. A row that
    fails is recorded and the walk goes on. Raises UserError when the model cannot be loaded.
    """
    out = Path(out)
    study = f"{shared['model']}-path"
    judge = Judge(shared)
    result = {
        "schema": results.SCHEMA,
        "study": study,
        "environment": results.environment(device),
        "settings": {**shared, "device": device, "prompts": [text for texts in judge.prompts for text in texts]},
        "rows": [],
    }
    ctx = process.context(device)
    for done, i in enumerate(ids):
        job = _job(shared, judge, device, tuple(NUMBERS)[: NUMBERS[i]], cutoff)
        row, images = _measured(ctx, i, job, lambda phase: progress(done, f"{i}: {phase}"))
        picture = out / study / image_name(i)
        picture.unlink(missing_ok=True)
        if images:
            results.write_whole(picture, _png(images[0][0]))
            row["quality"] = judge.judge(i, images)
            before = next(
                (r for r in result["rows"] if NUMBERS[r["id"]] == NUMBERS[i] - 1 and r["status"] == "ok"), None
            )
            row["note"] = notes.note(row, before, shared, device) if before else None
        if i == "compile" and row["status"] == "ok":
            progress(done, "channels_last, apart")
            row["apart"] = {"channels_last": _channels_last(ctx, shared, judge, device)}
        result["rows"].append(row)
        results.write(out / f"{study}.json", result)
    return result


def image_name(i):
    """The file name of the picture a step drew: "4-compile.png"."""
    return f"{NUMBERS[i]}-{i}.png"


def _check_room(out):
    results.write_whole(out / ".room", b"")
    (out / ".room").unlink()
    free = shutil.disk_usage(out).free
    if free < NEEDED_BYTES:
        raise UserError(f"only {free / 2**20:.0f} MiB are free for {out}: make room or give another folder with --out")


def _job(shared, judge, device, ids, cutoff, **more):
    return Job(
        ids=ids,
        device=device,
        prompts=judge.prompts,
        seeds=judge.seeds,
        options={"cutoff": cutoff, "steps": shared["steps"]},
        **{key: shared[key] for key in SHARED},
        **more,
    )


def _measured(ctx, i, job, on_phase):
    row = {"id": i, "label": path.STEPS[NUMBERS[i] - 1].title, "settings": {}, "status": "ok"}
    try:
        numbers, images = process.call(ctx, measure, job, on_phase, LIMIT_S)
    except process.RowFailed as failure:
        return {**row, "status": f"failed: {failure}", "quality": None}, None
    drawn_with = numbers.pop("drawn_with") | ({"cutoff": job.options["cutoff"]} if "cfg_cutoff" in job.ids else {})
    row["settings"] = {key: value for key, value in drawn_with.items() if value != getattr(job, key, None)}
    return {**row, **numbers}, images


def _channels_last(ctx, shared, judge, device):
    """The memory layout without the compiler: the step before `compile`, in channels_last."""
    job = _job(shared, judge, device, tuple(NUMBERS)[: NUMBERS["compile"] - 1], 0.4, channels_last=True)
    try:
        numbers, _ = process.call(ctx, measure, job, lambda phase: None, LIMIT_S)
    except process.RowFailed as failure:
        return {"status": f"failed: {failure}"}
    return {"status": "ok"} | {key: numbers[key] for key in ("latency_s", "first_call_s", "peak_memory_bytes")}


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Judge:
    """The prompts and seeds all rows share, and what is seen in the pictures drawn from them.

    pocket draws a test prompt and a seed of its own for every picture, and the oracle reads them; the others draw one
    prompt from several seeds. Pictures by random weights are noise and are not judged.
    """

    def __init__(self, shared):
        runs, batch = shared["runs"], shared["batch"]
        self.scenes = None
        texts = [shared["prompt"]] * (runs * batch)
        if shared["model"] == "pocket":
            prompts = test_prompts(runs * batch)
            texts, self.scenes = [p.text for p in prompts], [(p.text, p.scene) for p in prompts]
        chunks = [range(run * batch, (run + 1) * batch) for run in range(runs)]
        self.prompts = tuple(tuple(texts[k] for k in chunk) for chunk in chunks)
        self.seeds = tuple(tuple(shared["seed"] + k for k in chunk) for chunk in chunks)
        self.noise = shared["weights"] == "random"
        self.seen = {}

    def judge(self, i, images):
        """The quality of row `i`: what the oracle reads, and the drift from the baseline and from the step before."""
        if self.noise:
            return None
        pictures = self.seen[i] = [Image.fromarray(pixels) for batch in images for pixels in batch]
        seen = quality.seen(self.scenes, pictures) if self.scenes else {}
        before = list(NUMBERS)[max(0, NUMBERS[i] - 2)]
        for name, other in (("against_baseline", BASELINE), ("against_previous", before)):
            compared = other in self.seen and other != i
            seen[name] = quality.drift(pictures, self.seen[other]) if compared else None
        return seen
