"""What the notebooks say and keep: where they run, the rows other machines recorded, the results a test can check."""

import json
import os
from pathlib import Path

import diffusers
import torch
import transformers
from IPython.display import Markdown, display

from sdopt import figures, models, quality, report, results
from sdopt.bench import notes

KEPT = "application/vnd.sdopt.kept+json"
KEEP_IN = "SDOPT_KEEP"  # a folder; where set, kept results are also written there


def begin(model=None):
    """Print the machine, the versions and the model to be used, and why; returns (model, device).

    `model` None lets the machine decide; "pocket", "sd15" or "sdxl" decides. Introduced in
    notebooks/00_measure_first.
    """
    for library in (diffusers, transformers):  # loading pocket takes a second; downloads still show theirs
        library.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = models.pick(name=model)
    environment = results.environment(device)
    shown = ("gpu", "cpu", "torch", "cuda", "diffusers", "transformers", "torchao", "python")
    cells = [(key, environment[key]) for key in shown if environment[key]]
    lines = [f"| {key} | {value} |" for key, value in cells]
    lines.append(f"| **model** | **{choice.name}**: {choice.reason} |")
    display(Markdown("\n".join(["| | |", "|---|---|", *lines])))
    return models.MODELS[choice.name], device


def row(id, numbers, pictures=None, task=None, before=None):
    """A row of the course's table from what `drawing.measure` returned: {"id", "latency_s", ..., "quality", "status"}.

    With pocket's `pictures` and `task` the oracle says what share of what was asked for is there. `before`, the
    pictures of another row, adds the drift from them. Introduced in notebooks/01_baseline_fp32.
    """
    seen = None
    if pictures is not None:
        flat = [picture for run in pictures for picture in run]
        seen = quality.seen(task.scenes, flat) if task.scenes else {}
        seen |= {"against_baseline": quality.drift(flat, [p for run in before for p in run]) if before else None}
        seen |= {"against_previous": None}
    return {"id": id, "label": id, "settings": {}, "status": "ok", "quality": seen, **numbers}


def recorded(study, ids=None):
    """Rows that result files hold: [(machine, row)], of `ids` or all of them, machine by machine.

    The files are `figures/data/<machine>/<study>.json` of the repository. Introduced in notebooks/01_baseline_fp32.
    """
    found = []
    for path in _files(study):
        rows = results.read(path)["rows"]
        found += [(path.parent.name, r) for r in rows if r["status"] == "ok" and (ids is None or r["id"] in ids)]
    return found


def recorded_metrics(study):
    """What a study other than a path measured: [(machine, {"part": [...]})], machine by machine.

    The files are `figures/data/<machine>/<study>.json`, written by `python -m sdopt.bench.lessons`. Introduced in
    notebooks/00_measure_first.
    """
    return [(path.parent.name, results.read_json(path)["metrics"]) for path in _files(study)]


def _files(study):
    return sorted((report.ROOT / "figures" / "data").glob(f"*/{study}.json"))


def table(rows, others=()):
    """Show rows measured here, then those of other machines, as one table; under it, which recorded rows waited for a CPU.

    `others`: what `recorded` returns. Introduced in notebooks/01_baseline_fp32.
    """
    lines = [
        "| row | where | median | p20 to p80 | first call | peak memory | PSNR to baseline |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for where, r in [*(("here", r) for r in rows), *others]:
        latency = r["latency_s"]
        drift = (r["quality"] or {}).get("against_baseline")
        lines.append(
            f"| {r['id']} | {where if where == 'here' else f'recorded: {where}'} | {figures.seconds(latency['median'])} "
            f"| {figures.seconds(latency['p20'])[:-2]} to {figures.seconds(latency['p80'])[:-2]} "
            f"| {figures.seconds(r['first_call_s'])} | {r['peak_memory_bytes'] / 2**20:,.0f} MiB "
            f"| {figures.decibels(drift) if drift else ''} |"
        )
    for (where, before), (there, r) in zip(others, others[1:]):
        if where == there and (waits := notes.waits_longer(r, before)):
            lines += ["", f"- recorded: {where}, {r['id']}, beside {before['id']}: {waits}"]
    display(Markdown("\n".join(lines)))


def keep(name, **values):
    """Keep a notebook's key results in its output, where tests look for them: numbers, texts, lists, dicts.

    Introduced in notebooks/00_measure_first.
    """
    text = json.dumps(values, indent=1, allow_nan=False)
    display({KEPT: {"name": name, "values": json.loads(text)}, "text/plain": f"kept: {', '.join(values)}"}, raw=True)
    if os.environ.get(KEEP_IN):
        results.write_json(Path(os.environ[KEEP_IN]) / f"{name}.json", values)
