"""A quality study: what each row's pictures show and how far they are from the baseline's, beside what one takes.

Rows that share a pipeline follow one another in one process, so that each pipeline is loaded, compiled or captured once.
A row is first timed as in the other studies, one picture a call, and then draws a picture for each of thousands of prompts,
hundreds a call. What is seen in every picture is kept beside the result, in OUT/<study>/<row>.json.xz.

How long `pocket-quality` takes on an H200, reckoned before its first run, of 78 rows, 2,560 pictures each:
- the UNet sees 1.3 million samples in fp32 (9 rows; 4,000 a second and more, from pocket-card.json: 860,000 in less than
  214 s), 1.6 in bf16 (11 rows; 12,000 a second, from a third of what training computes at 6,067) and 5.8 on the engine (58
  rows; 15,000 a second): 320 + 130 + 390 s;
- decoding, and judging with SSIM, oracle and Frechet distance: 1.5 s a row in all: 120 s;
- compiling: 9 rows in 7 processes, about 20 graphs not found in the cache, 15 s each: 300 s;
- 16 processes, their imports hidden behind the pictures of the one before, 5 s each, and timing, 0.3 to 6 s a row: 180 s.
Together 24 minutes, of which the 15 s a graph are the least known. `took_s` of each row says what it was.
"""

from itertools import groupby
from pathlib import Path

from sdopt import records
from sdopt.bench import gallery, process, sharing
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.sweeps import REFERENCE
from sdopt.bench.walk import LIMIT_S, job_of
from sdopt.errors import UserError


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
        begin = lambda worker, job, **how: _begin(worker, job, shared["pictures"], shelf, **how)
        measure = lambda worker, job, **how: worker.call(gallery.measure, job, shared["pictures"], shelf, **how)
        put = lambda job, answer: _put(ledger, job, shared, *answer)
        for _, group in groupby(todo, key=lambda row: row.pipeline):
            jobs = [job_of(row, shared, judge, device, out / "cache") for row in group]
            tell = lambda k, text, done=done: progress(done + k, text)
            sharing.together(ledger, fresh, jobs, begin, measure, put, tell, limit_s)
            done += len(jobs)
    return ledger.result


def _todo(ledger, rows, every, shelf):
    """The rows still to be measured; the reference before all, where they need the pictures that it has to leave."""
    todo = [row for row in rows if not ledger.is_done(row.id) or _lost(ledger, row.id)]
    if any(row.compares for row in todo) and (not shelf.pictures.exists() or _lost(ledger, REFERENCE)):
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


def _begin(worker, job, pictures, shelf, **how):
    if pictures >= gallery.ENOUGH and not shelf.real.exists():
        worker.call(gallery.real, job.device, pictures, shelf, **how)
    return worker.call(gallery.begin, job, **how)


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
