"""A path study: the steps in taught order, each row in a fresh process, judged by speed, memory and picture."""

import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from sdopt import compilation, path, results
from sdopt.bench import claims, notes, process, searches
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.row import FIRST_CALL, Job, Recipe, first_call, measure
from sdopt.pathfigures import PICTURED

LIMIT_S = 3600.0
SHARED = ("model", "weights", "height", "width", "steps", "guidance_scale", "scheduler")


def walk(
    shared,
    recipes,
    device,
    out,
    progress=lambda done, text: None,
    order=None,
    resume=False,
    retry=False,
    limit_s=LIMIT_S,
):
    """Measure the rows `recipes` with the `shared` settings; returns the result, written to `out` after every row.

    `progress(done, text)` is told how many rows are done and what is under way, once the model has loaded. A row that
    fails is recorded and the walk goes on. `order`: the ids of all rows the file may hold, None: these. `resume`: rows
    that `out` has are kept (with `retry` those that failed are not), and what compiles is first called in a process of
    its own, so that the first call is known both cold and with the compiler's cache warm. Without it `recipes` are measured
    again, and of the others those stay that were measured alike.
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, study = Path(out), f"{shared['model']}-path"
    judge = Judge(shared, out / study / "all" if resume else None)
    order = order or [recipe.id for recipe in recipes]
    with alone(out), process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
        about = head(study, shared, device, judge.prompts, "bench" if resume else "run")
        ledger = Ledger(out / f"{study}.json", about, order, resume, retry, again=[recipe.id for recipe in recipes])
        if not resume:
            _clear_pictures(out / study, [row["id"] for row in ledger.result["rows"]])
        todo = [recipe for recipe in recipes if not ledger.is_done(recipe.id)]
        for done, recipe in enumerate(todo, len(recipes) - len(todo)):
            job = job_of(recipe, shared, judge, device, out / "cache" if resume else None)
            tell = partial(lambda done, i, phase: progress(done, f"{i}: {phase}"), done, recipe.id)
            row, images = _measured(ledger, fresh, job, tell, limit_s)
            row["quality"] = judge.judge(recipe.id, images) if images else None
            if recipe.id in PICTURED:
                _keep_picture(out / study / image_name(recipe.id), images, judge)
            before = _before(ledger, recipe.id)
            row["note"] = notes.note(row, before, shared, device) if before and images else None
            if recipe.id == "compile" and images:
                tell("channels_last, apart")
                row["apart"] = {"channels_last": _channels_last(fresh, job, limit_s)}
            ledger.put(row)
    return ledger.result


def _measured(ledger, fresh, job, tell, limit_s):
    """A row with its numbers and its images, or with the reason why it has none."""
    recipe, images = job.recipe, None
    row = ledger.begun(recipe)
    try:
        compile_first(ledger, row, fresh, job, tell, limit_s)
        numbers, images = fresh.call(measure, job, on_phase=tell, limit_s=limit_s)
        row |= timed(row, numbers, job) | {"status": "ok"}
    except process.RowFailed as failure:
        row |= {"status": f"failed: {failure}"}
    return row, images


def job_of(recipe, shared, judge, device, cache=None):
    """The job of a row: its recipe, and the task that all rows share."""
    task = {key: shared[key] for key in SHARED}
    return Job(recipe, device=device, prompts=judge.prompts, seeds=judge.seeds, cache=cache, **task)


def compile_first(ledger, row, fresh, job, tell, limit_s, beside=()):
    """Give `row`, if it compiles, its "first_calls", and see that the next call of its job finds everything compiled.

    `beside`: the jobs that are compiled at the same time, whose ids are said where the first call is new.
    Where neither the cache nor its export has come along, on another machine that is, it is compiled once more; what the
    first call took stays as it was measured then.
    """
    if is_to_compile(row, job):
        calls = cold(fresh, job, tell, limit_s, beside)
        others = [other.recipe.id for other in beside]
        row.setdefault("first_calls", calls | ({"beside": others} if others else {}))
        ledger.put(row)


def is_to_compile(row, job):
    """Whether a row compiles, and has not yet or not here."""
    return job.artifacts is not None and not ("first_calls" in row and job.artifacts.exists())


def cold(fresh, job, tell, limit_s, beside=()):
    """The first call in a process of its own: {"cold_s", "compiled", "found"}; cold_s None when nothing was compiled.

    Where an earlier call had been stopped, or its searches were put into the folder, "before_s" of cold_s are its. On a GPU
    a search is shared by several processes (bench/claims.py): "shared_s" of cold_s are theirs, added up. `beside`: the jobs
    that are compiled at the same time, and share the machine.
    """
    known, began = searches.begin(job), []
    how = claims.LATER if job.shares_search else claims.ALONE
    before, own, shared = known["spent_s"], 0.0, 0.0
    counted = lambda seconds: 0.0 if known["finished"] else seconds  # what is found once more took its seconds then
    keep = lambda seconds, finished=False: searches.keep(job, before + counted(seconds), finished or known["finished"])

    def told(phase):
        if phase.startswith(FIRST_CALL):
            began.append(time.monotonic())
        tell(phase)

    def note():
        if began:
            keep(time.monotonic() - began[0])

    first = fresh.call(first_call, replace(job, search=how), on_phase=told, meanwhile=note, limit_s=limit_s)
    if first["graphs"]["compiled"]:
        own = first["first_call_s"]
    if left := first.get("left"):
        searches.go_on(job)
        # Where all is found already, one process compiles it: the next call finds it as it would after a search.
        left = [find for find in left if not searches.is_found(Path(find))]
        processes = max(1, first["processes"] // (1 + len(beside))) if left else 1
        shared = _search_together(fresh, job, processes, len(left), tell, lambda seconds: keep(own + seconds), limit_s)
    if own or shared:
        keep(own + shared, finished=True)
    parts = {"before_s": before, "shared_s": counted(shared)}
    cold_s = before + counted(own + shared)
    return {"cold_s": cold_s or None} | first["graphs"] | {name: s for name, s in parts.items() if s}


def _search_together(fresh, job, processes, left, tell, keep, limit_s):
    """Let so many `processes` search the `left` kernels of a job that has been compiled; returns their seconds, added up.

    `keep(seconds)` is called now and then with those so far. A process that fails leaves its kernel unsearched, and the next
    first call searches it. Raises RowFailed when all fail, or are ended from elsewhere.
    """
    claims.begin(job.claims)
    spent = lambda: claims.seconds(job.claims)
    workers = [fresh.take() for _ in range(processes)]
    search = lambda worker: worker.call(first_call, replace(job, search=claims.SHARED), limit_s=limit_s)
    with ThreadPoolExecutor(processes) as pool:
        calls = [pool.submit(search, worker) for worker in workers]
        try:
            while futures.wait(calls, process.LOOK_S / 10).not_done:
                keep(sum(spent()))
                done = f"{processes} processes search, {len(spent())} of {left} kernels done"
                tell(done if left else "compiling what was found")
        finally:
            keep(sum(spent()))
            for worker in workers:
                worker.stop()
    failures = [call.exception() for call in calls]
    if fresh.stopped or all(failures):
        raise next(filter(None, failures), process.RowFailed("stopped"))
    return sum(spent())


def timed(row, numbers, job):
    """The numbers of a row as the result file has them, with its first calls, cold and warm, in their places."""
    drawn_with = numbers.pop("drawn_with")
    differs = {key: value for key, value in drawn_with.items() if value != getattr(job, key, None)}
    more = {"settings": job.recipe.settings | differs}
    return numbers | more | both_calls(row, numbers)


def both_calls(row, numbers):
    """Of a row that was compiled before it was measured: its first calls, and as its own the cold one, where there was one."""
    if "first_calls" not in row:
        return {}
    calls = row["first_calls"] | {"warm_s": numbers["first_call_s"]}
    return {"first_calls": calls, "first_call_s": calls["cold_s"] or calls["warm_s"]}


def _clear_pictures(folder, kept):
    """Delete the pictures of rows that are not `kept`."""
    for i in PICTURED:
        if i not in kept:
            (folder / image_name(i)).unlink(missing_ok=True)


def image_name(i):
    """The file name of the picture a row drew: "4-compile.png"."""
    return f"{PICTURED.index(i) + 1}-{i}.png"


def _before(ledger, i):
    """The row of the step before, where there is one that was measured."""
    before = ledger.row(path.step_before(i))
    return before if before.get("status") == "ok" else None


def _channels_last(fresh, job, limit_s):
    """The memory layout without the compiler: the step before `compile`, in channels_last."""
    eager = tuple(i for i in job.recipe.steps if i != "compile")
    layout = Recipe("channels_last", "the layout alone", eager, job.recipe.options, apply=compilation.channels_last)
    alone = replace(job, recipe=layout)
    try:
        numbers, _ = fresh.call(measure, alone, limit_s=limit_s)
    except process.RowFailed as failure:
        return {"status": f"failed: {failure}"}
    return {"status": "ok"} | {key: numbers[key] for key in ("latency_s", "first_call_s", "peak_memory_bytes")}


def _keep_picture(target, images, judge):
    target.unlink(missing_ok=True)
    if images and not judge.noise:  # what random weights draw is noise, and would be told from another's by nothing
        results.write_whole(target, results.png(Image.fromarray(images[0][0])))
