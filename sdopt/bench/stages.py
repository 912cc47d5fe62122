"""A study of stages: what each step asks of each part of a picture, how long that should take, and how long it takes.

Each row in a fresh process, in this order: load and prepare the row, all but what compiles it or puts it on the engine; draw
one picture and count its operators, stage by stage; measure the ceilings of the number formats they calculate in; from these
alone predict each stage (`roofline`); then compile, draw the timed pictures, and as many once more with marks between the
stages. The prediction is made before anything of the row has been timed.
"""

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

from sdopt import compilation, drawing, engine, roofline, timing
from sdopt.bench import process, sensors
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import Ledger, alone, head
from sdopt.bench.row import apply, how_it_ran, keep_artifacts, load
from sdopt.bench.walk import LIMIT_S, job_of, timed


def look(
    shared, rows, device, out, progress=lambda done, text: None, order=None, retry=False, limit_s=LIMIT_S, study=None
):
    """Measure the rows `rows` with the `shared` settings; returns the result, written to `out` after every row.

    `order`: the ids of all rows the file may hold, None: these. Rows that `out` has are kept (with `retry` those that failed
    are not); one that fails is recorded with its reason, and the study goes on. `study`: its name, None: the model's "-stages".
    Raises UserError when the model cannot be loaded, or `out` has rows that were measured otherwise.
    """
    out, judge, study = Path(out), Judge(shared), study or f"{shared['model']}-stages"
    with alone(out), process.Fresh(process.context(device), ahead=device == "cuda") as fresh:
        about = head(study, shared, device, judge.prompts, "bench")
        ledger = Ledger(out / f"{study}.json", about, order or [row.id for row in rows], True, retry)
        todo = [row for row in rows if not ledger.is_done(row.id)]
        for done, recipe in enumerate(todo, len(rows) - len(todo)):
            job, row = job_of(recipe, shared, judge, device, out / "cache"), ledger.begun(recipe)
            tell = lambda phase, done=done, i=recipe.id: progress(done, f"{i}: {phase}")
            try:
                row |= timed(row, fresh.call(measure, job, on_phase=tell, limit_s=limit_s), job) | {"status": "ok"}
            except process.RowFailed as failure:
                row |= {"status": f"failed: {failure}"}
            ledger.put(row)
    return ledger.result


def measure(state, tell, job):
    """One row: its numbers as `row.measure` has them, and beside them "roofline".

    {"ceilings": {"flops_per_s": {format: FLOP/s}, "bytes_per_s", "launch_s"}, "call_ms", "stages": {stage: {"way", "operators",
    "flops": {format: FLOPs}, "bytes", "predicted_ms", "limit", "kinds": {kind: {"flops", "bytes"}}}}}; "stages_ms" are those of
    one call, the one of median length, and "call_ms" is all of it. The first call comes after one that was counted.
    """
    began = time.perf_counter()
    pipe = load(job, tell)
    took = {"load": time.perf_counter() - began}
    eager = tuple(i for i in job.recipe.steps if i != "compile")
    pipe, call = apply(pipe, replace(job.recipe, steps=eager, apply=None))
    tell("counting its operators")
    counted = roofline.count_stages(pipe, drawing.drawer(pipe, job, **call))
    tell("ceilings")
    formats = {name for operators in counted.values() for name in roofline.formats(operators)}
    ceilings = roofline.ceilings(job.device, formats)
    pipe, call = apply(pipe, job.recipe)
    predicted = {stage: _stage(counted[stage], ceilings, way) for stage, way in ways(pipe).items()}

    seen = {}
    numbers, _ = drawing.measure(pipe, job, tell, sensors.watch(job.device, seen), **call)
    memory_of = numbers.pop("peak_memory_of")
    keep_artifacts(job)
    tell("stages")
    numbers["stages_ms"], call_ms = _marked(pipe, drawing.drawer(pipe, job, **call), job)
    tell(process.PROFILING)
    numbers |= how_it_ran(pipe, job, call, memory_of) | ({"gpu": seen} if seen else {})
    took["measure"] = time.perf_counter() - began - took["load"]
    return numbers | {
        "roofline": {"ceilings": asdict(ceilings), "call_ms": call_ms, "stages": predicted},
        "took_s": took,
    }


def ways(pipe):
    """How each stage of a pipeline runs, of `roofline.WAYS`. The engine only captures text encoders, it fuses the others."""
    on_engine = engine.is_prepared(pipe)
    return {
        "text_encoder": "graph" if on_engine else "eager",
        "unet": "fused" if on_engine or compilation.compiled_kind(pipe) else "eager",
        "scheduler": "eager",
        "vae": "fused" if on_engine or timing.compiled_parts(pipe.vae) else "eager",
    }


def _stage(operators, ceilings, way):
    foreseen, kinds = roofline.predict(operators, ceilings, way), {}
    for operator, times in operators.items():
        kind = kinds.setdefault(operator.kind, {"flops": 0, "bytes": 0})
        kind["flops"] += times * operator.flops
        kind["bytes"] += times * operator.bytes
    about = {"predicted_ms": 1e3 * foreseen.seconds, "limit": foreseen.limit, "kinds": kinds}
    return {"way": way} | roofline.totals(operators, way) | about


def _marked(pipe, draw, job):
    """The stages of as many calls as are timed: those of the call of median length, and its milliseconds."""
    calls = []
    for run in range(len(job.prompts)):
        found = {}
        seconds = timing.seconds_of(lambda: found.update(timing.stages(pipe, lambda: draw(run))), job.device)
        calls.append((1e3 * seconds, found))
    middle = statistics.median_low(ms for ms, _ in calls)
    ms, stages = next(call for call in calls if call[0] == middle)
    return stages, ms
