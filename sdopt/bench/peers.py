"""A peer study: every row in a process that stays, a picture each in turn, in another order each round."""

import random
from pathlib import Path

from sdopt.bench import process, sensors
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.row import draw_timed, first_call, give_back, look, new_size, settle
from sdopt.bench.walk import LIMIT_S, compile_first, is_to_compile, job_of, timed
from sdopt.timing import latency


def take_turns(
    shared, recipes, device, out, progress=lambda done, text: None, order=None, retry=False, limit_s=LIMIT_S, study=None
):
    """Measure the rows `recipes` side by side; returns the result, written to `out` after every round.

    `order`: the ids of all rows the file may hold, None: these. Rounds that `out` has are kept; with `retry` rows that
    failed are measured, too. `study`: its name, None: the model's "-peers". A row that fails drops out with its reason,
    the others go on. In round r the rows draw run r's picture, in an order shuffled by r, so that what changes about
    the machine meets all alike.
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, judge, study = Path(out), Judge(shared), study or f"{shared['model']}-peers"
    order, workers = order or [recipe.id for recipe in recipes], {}
    with alone(out):
        about = head(study, shared, device, judge.prompts, "bench")
        ledger = Ledger(out / f"{study}.json", about, order, True, retry)
        jobs = {r.id: job_of(r, shared, judge, device, out / "cache") for r in recipes}
        todo = [i for i in jobs if not ledger.is_done(i)]
        try:
            with process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
                fresh.start_next(len(todo) + sum(jobs[i].recipe.compiles for i in todo))  # what compiles ends, and is loaded anew
                compiled = _compile_side_by_side(ledger, [jobs[i] for i in todo], fresh, progress, limit_s)
                todo = [i for i in todo if compiled.get(i, True)]
                for n, i in enumerate(todo):
                    tell = lambda phase: progress(0, f"{n + 1}/{len(todo)} {i}: {phase}")
                    for ready in list(workers):  # loading takes more memory than drawing
                        _ask(ledger, workers, ready, give_back, limit_s=limit_s)
                    _ready(ledger, jobs[i], fresh, workers, tell, limit_s, i in compiled)
            _rounds(ledger, shared["runs"], device, workers, progress, limit_s)
            for i, worker in workers.items():
                progress(shared["runs"], f"{i}: a last look")
                _look(ledger, jobs[i], worker, limit_s)
            for worker in workers.values():  # while nothing is timed, and all at once
                fresh.let_go(worker)
            fresh.join()
        finally:
            for worker in workers.values():
                worker.stop()
    return ledger.result


def _compile_side_by_side(ledger, jobs, fresh, progress, limit_s):
    """Compile those of `jobs` whose search is shared, all at once: {id: whether it could be}; a row that cannot is recorded.

    A search takes many minutes, for the most part of one thread. What is drawn with later is loaded afterwards, one row after
    another.
    """
    jobs = [job for job in jobs if job.shares_search and is_to_compile(ledger.begun(job.recipe), job)]
    if not jobs:
        return {}

    def compiled(job):
        row, beside = ledger.begun(job.recipe), [other for other in jobs if other is not job]
        tell = lambda phase: progress(0, f"{job.recipe.id}: {phase}")
        try:
            compile_first(ledger, row, fresh, job, tell, limit_s * len(jobs), beside)
        except process.RowFailed as failure:
            if not fresh.stopped:  # its own
                ledger.put(row | {"status": f"failed: {failure}"})
            return False
        return True

    could = fresh.side_by_side(compiled, jobs, len(jobs))
    return {job.recipe.id: each for job, each in zip(jobs, could, strict=True)}


def _ready(ledger, job, fresh, workers, tell, limit_s, compiled):
    """Load, compile (unless it is) and warm up one peer, in a worker that stays."""
    recipe = job.recipe
    row = ledger.begun(recipe)
    try:
        if not compiled:
            compile_first(ledger, row, fresh, job, tell, limit_s)
        worker = fresh.take()
        try:
            first = worker.call(first_call, job, on_phase=tell, limit_s=limit_s)
            fresh.start_next()
            numbers = worker.call(settle, job, on_phase=tell, limit_s=limit_s)
            row |= timed(row, numbers | {key: first[key] for key in ("prepare_s", "first_call_s")}, job)
        except BaseException:
            worker.stop()
            raise
        workers[recipe.id] = worker
        ledger.put(row)
    except process.RowFailed as failure:
        ledger.put(row | {"status": f"failed: {failure}"})


def _rounds(ledger, runs, device, workers, progress, limit_s):
    seen, together = {}, sorted(workers)
    done = min((len(_runs(ledger, i)) for i in workers), default=runs)
    with sensors.watch(device, seen):
        for turn in range(done, runs):
            order = sorted(workers)
            random.Random(turn).shuffle(order)
            rows = []
            for i in order:
                progress(turn, i)
                seconds = _ask(ledger, workers, i, draw_timed, turn, limit_s=limit_s)
                if i in workers:
                    times = latency([*_runs(ledger, i)[:turn], seconds])
                    status = {"status": "ok"} if turn == runs - 1 else {}  # what comes after adds to it
                    rows.append(ledger.row(i) | {"latency_s": times, "beside": together} | status)
            ledger.put(*rows)
    if seen:
        ledger.put(gpu_while_timed=seen)


def _ask(ledger, workers, i, function, *arguments, limit_s):
    """What the worker of row `i` answers; one that fails leaves, its row says why, and the others go on."""
    try:
        return workers[i].call(function, *arguments, limit_s=limit_s)
    except process.RowFailed as failure:
        ledger.put(ledger.row(i) | {"status": f"failed: {failure}"})
        workers.pop(i).stop()


def _runs(ledger, i):
    return ledger.row(i).get("latency_s", {}).get("runs", [])


def _look(ledger, job, worker, limit_s):
    """Add to a row what is found out after it was timed; it is "ok" from now on in any case, and has what could be found."""
    row = ledger.row(job.recipe.id)
    try:
        attended, more = worker.call(look, job, limit_s=limit_s)
    except process.RowFailed as failure:
        attended, more = {"attention": None, "attention_unknown": str(failure)}, {}
    try:
        more |= worker.call(new_size, job, limit_s=limit_s)
    except process.RowFailed as failure:
        more |= {"other_size_unknown": str(failure)}
    how = {key: value for key, value in row["as_run"].items() if key != "attention_unknown"}
    ledger.put(row | more | {"as_run": how | attended, "status": "ok"})
