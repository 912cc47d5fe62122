"""A quality study: what each row's pictures show and how far they are from the baseline's, beside what one takes.

Rows that share a pipeline follow one another in one process, so that each pipeline is loaded, compiled or captured once.
A row is first timed as in the other studies, one picture a call, and then draws a picture for each of thousands of prompts,
hundreds a call. What is seen in every picture is kept beside the result, in OUT/<study>/<row>.json.xz.

How long `pocket-quality` takes on an H200, by `took_s` of the 80 rows recorded there (2,560 pictures each), 24 minutes in all:
- 4.1 minutes to compile what 9 rows need, and 15 s to render;
- 57 rows of sweeps, on the engine, 5.9 minutes: 0.07 s to draw for each sample a picture of the UNet, and 2.9 s for the rest,
  decoding and judging with SSIM, oracle and Frechet distance;
- 10 rows in eager code 5.4 minutes, int8 in eager code 1.9; 9 rows that compile, found compiled, 4.4 minutes; 3 on the engine 1;
- 1 minute for processes to end before the next began.
"""

from functools import partial
from itertools import groupby
from pathlib import Path

from sdopt import records
from sdopt.bench import gallery, process, sharing
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.sweeps import REFERENCE
from sdopt.bench.walk import LIMIT_S
from sdopt.errors import UserError
from sdopt.pocket.captions import test_prompts


def survey(
    shared, rows, device, out, progress=lambda done, text: None, every=None, retry=False, limit_s=LIMIT_S, study="pocket-quality"
):
    """Measure the rows `rows` with the `shared` settings; returns the result, written to `out` after every row.

    `shared["pictures"]`: how many prompts each row draws. `every`: all rows of the study, None: these. Rows that `out`
    has are kept (with `retry` those that failed are not). The reference is drawn first wherever its pictures are not at
    hand. A row that fails is recorded and the study goes on.
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, judge, every = Path(out), Judge(shared), every or rows
    shelf = gallery.Shelf(out / study / f"shelf-{judge.asked}")
    with alone(out), process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
        about = head(study, shared, device, judge.prompts, "bench")
        ledger = Ledger(out / f"{study}.json", about, [row.id for row in every], True, retry)
        todo = _todo(ledger, rows, every, shelf)
        done = max(0, len(rows) - len(todo))
        asked = test_prompts(shared["pictures"]) if todo else ()  # once for all processes: it takes seconds
        begin = lambda worker, job, **how: _begin(fresh, worker, job, asked, shelf, **how)
        measure = lambda worker, job, **how: worker.call(gallery.measure, job, asked, shelf, **how)
        put = lambda job, answer: _put(ledger, job, shared, *answer)
        groups = [list(group) for _, group in groupby(todo, key=lambda row: row.pipeline)]
        groups = [[sharing.own_job(row, shared, device, out / "cache") for row in group] for group in groups]
        fill = lambda few, jobs: fresh.call(gallery.compile_ahead, jobs, few, limit_s=limit_s)
        fills = [partial(fill, few) for few in (asked[: gallery.AT_ONCE[device]], ())]  # many take longer: they begin first
        sharing.compile_ahead(fresh, groups, fills, lambda text: progress(done, text))
        for jobs in groups:
            tell = lambda k, text, done=done: progress(done + k, text)
            sharing.together(ledger, fresh, jobs, begin, measure, put, tell, limit_s)
            done += len(jobs)
    return ledger.result


def _todo(ledger, rows, every, shelf):
    """The rows still to be measured; the reference before all, where they need what it has to leave: its record, its pictures."""
    todo = [row for row in rows if not ledger.is_done(row.id) or _lost(ledger, row.id)]
    unknown = ledger.row(REFERENCE).get("status") != "ok" or _lost(ledger, REFERENCE)
    if (todo and unknown) or (any(row.compares for row in todo) and not shelf.pictures.exists()):
        todo = [row for row in every if row.id == REFERENCE] + [row for row in todo if row.id != REFERENCE]
    return todo


def _lost(ledger, i):
    """Whether a row that was measured has no record any more that can be read."""
    if ledger.row(i).get("status") != "ok":
        return False
    try:
        records.read(_record(ledger, i))
    except UserError:
        return True
    return False


def _begin(fresh, worker, job, asked, shelf, **how):
    """Load a pipeline while the process before puts its things away, which nothing is timed beside."""
    if len(asked) >= gallery.ENOUGH and not shelf.real.exists():
        worker.call(gallery.real, job.device, asked, shelf, **how)
    took = worker.call(gallery.begin, job, **how)
    fresh.join()
    return took


def _put(ledger, job, shared, numbers, record, distance):
    """Write a row's record, then the row with what follows from it."""
    recipe, reference = job.recipe, _record(ledger, REFERENCE)
    records.write(_record(ledger, recipe.id), record)
    other = records.read(reference) if recipe.id != REFERENCE and reference.exists() else None
    more = {
        "settings": recipe.differs(shared),
        "family": recipe.family,
        "unet_samples": recipe.samples(shared["steps"]),
        "quality": records.quality(record, other, distance),
        "status": "ok",
    }
    ledger.put(ledger.begun(recipe) | numbers | more)


def _record(ledger, i):
    """Where the record of row `i` lies: in the folder named like the result file."""
    return ledger.path.with_suffix("") / f"{i}{records.SUFFIX}"
