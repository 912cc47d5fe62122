"""A study whose rows share pipelines: those of one follow one another in one process, so that it is loaded and compiled once.

The rows of `bench/grids.py` are timed as a path's are. They are not judged: their pictures are those of a path's steps.
"""

import gc
import os
from functools import partial
from pathlib import Path

import torch

from sdopt import drawing, engine
from sdopt.bench import gallery, process
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.walk import LIMIT_S, both_calls, job_of

ROOM = 72  # pictures of all processes that compile side by side: of Stable Diffusion XL's a large GPU holds as many


def share(shared, rows, device, out, progress=lambda done, text: None, every=None, retry=False, limit_s=LIMIT_S, study=None):
    """Measure the rows `rows` with the `shared` settings; returns the result, written to `out` after every row.

    `every`: all rows of the study, None: these. Rows that `out` has are kept (with `retry` those that failed are not). A
    row that fails is recorded with its reason, and the rows after it go on in a new process.
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, order = Path(out), [row.id for row in every or rows]
    with alone(out), process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
        about = head(study, shared, device, Judge(shared).prompts, "bench")
        ledger = Ledger(out / f"{study}.json", about, order, True, retry)
        todo = [row for row in rows if not ledger.is_done(row.id)]
        done = len(rows) - len(todo)
        begin = lambda worker, job, **how: worker.call(gallery.begin, job, **how)
        call = lambda worker, job, **how: worker.call(measure, job, **how)
        begun = lambda recipe: _row(ledger, recipe, shared)
        put = lambda job, answer: ledger.put(_measured(begun(job.recipe), answer[0]))
        pipelines = {row.pipeline: [] for row in todo}
        for row in todo:
            pipelines[row.pipeline].append(own_job(row, shared, device, out / "cache"))
        _first_calls(ledger, fresh, pipelines.values(), begun, lambda text: progress(done, text), limit_s)
        for jobs in pipelines.values():
            tell = lambda k, text, done=done: progress(done + k, text)
            together(ledger, fresh, jobs, begin, call, put, tell, limit_s, begun)
            fresh.join()  # a large batch left no memory to load the next pipeline beside it
            done += len(jobs)
    return ledger.result


def _first_calls(ledger, fresh, pipelines, begun, tell, limit_s):
    """Compile ahead what the rows need, and note what their first calls took so; rows that search do that by themselves."""
    groups = []
    for jobs in pipelines:
        if not jobs[0].recipe.searches:
            groups += [[job] for job in jobs] if jobs[0].recipe.renewed else [jobs]
    fill = lambda jobs: fresh.call(gallery.compile_ahead, jobs, limit_s=limit_s)
    calls = compile_ahead(fresh, groups, [fill], tell)
    for jobs in groups:
        own = {job.recipe.id: job.recipe for job in jobs}
        beside = [i for i in calls if i not in own]  # those of one process follow one another
        for i in calls.keys() & own.keys():
            row = begun(own[i])
            row.setdefault("first_calls", calls[i] | {"beside": beside})
            ledger.put(row)


def compile_ahead(fresh, groups, fills, tell):
    """Let all that compiles do so side by side before anything is timed: each of `fills` for each group, a process each.

    `fill(jobs)` answers {row id: its first call}; the rows find what it compiled in the cache, which their `graphs` say. Not
    where there is room for one process alone. A process that fails is no matter: its rows compile for themselves, and say
    why they cannot. Returns the first calls of all.
    """
    batch = lambda jobs: max(len(job.prompts[0]) for job in jobs)
    groups = [jobs for jobs in groups if jobs[0].recipe.compiles]
    groups.sort(key=lambda jobs: (batch(jobs), len(jobs)), reverse=True)  # what takes longest begins first
    work = [(fill, jobs) for fill in fills for jobs in groups]
    at_once = min(len(work), (os.cpu_count() or 1) // 2, ROOM // max(map(batch, groups), default=1))
    if at_once < 2:
        return {}
    tell(f"compiling what {sum(map(len, groups))} rows need, {at_once} processes side by side")

    def filled(item):
        fill, jobs = item
        try:
            return fill(jobs)
        except process.RowFailed:
            return {}

    return {i: first for calls in fresh.side_by_side(filled, work, at_once) for i, first in calls.items()}


def together(ledger, fresh, jobs, begin, measure, put, progress, limit_s, begun=None):
    """Measure the rows of one pipeline in one process; after a row that fails, in a new one.

    `begin(worker, job, **how)` loads the pipeline and answers the seconds it took; `measure(worker, job, **how)` answers a
    tuple whose first is a row's numbers, with "took_s", and `put(job, answer)` writes them. `begun(recipe)` is a row
    without numbers, to say why it failed in; None: the ledger's. The process is let go at the end: `fresh.join` waits for it.
    """
    worker, begun = None, begun or ledger.begun
    try:
        for k, job in enumerate(jobs):
            tell = partial(_told, fresh, progress, k, job.recipe.id, job is jobs[-1])
            how, took = {"on_phase": tell, "limit_s": limit_s}, {}
            if worker is None:
                worker = fresh.take()
                try:
                    took["load"] = begin(worker, job, **how)
                except process.RowFailed as failure:  # as it would for the other rows
                    ledger.put(*(begun(left.recipe) | {"status": f"failed: {failure}"} for left in jobs[k:]))
                    return
            try:
                answer = measure(worker, job, **how)
            except process.RowFailed as failure:
                ledger.put(begun(job.recipe) | {"status": f"failed: {failure}"})
                worker.stop()
                worker = None
                continue
            answer[0]["took_s"] = took | answer[0]["took_s"]
            put(job, answer)
        if worker:
            fresh.start_next()
            fresh.let_go(worker)
            worker = None
    finally:
        if worker:
            worker.stop()


def measure(state, tell, job):
    """After `gallery.begin`: time the row of `job`; returns its numbers, in a tuple of their own."""
    if job.recipe.renewed and state["drawn"]:
        renew(state["pipe"], job.recipe)
    return (gallery.timed(state, tell, job)[0],)


def renew(pipe, recipe):
    """Forget the graphs of the row before, so that a batch has the memory and the first call that it has alone."""
    if drawing.is_compiled(pipe):
        torch._dynamo.reset()
    if engine.is_prepared(pipe):
        recipe.apply(engine.restore(pipe))
    gc.collect()


def _told(fresh, progress, k, i, last, phase):
    if last and phase == gallery.PICTURES:
        fresh.start_next()
    progress(k, f"{i}: {phase}")


def _row(ledger, recipe, shared):
    """What a row says whatever becomes of it: its settings, and what it is there for."""
    return ledger.begun(recipe) | {"settings": recipe.differs(shared)} | recipe.told


def _measured(row, numbers):
    return row | numbers | both_calls(row, numbers) | {"status": "ok"}


def own_job(row, shared, device, cache):
    """The job of a row of a study whose rows share pipelines, with a batch and a number of runs of its own."""
    own = shared | row.timed_with(shared)
    return job_of(row, own, Judge(own), device, cache)
