"""What a page says of a study in words, every number from its result file."""

from sdopt import figures, results
from sdopt.bench.notes import SUBJECTS
from sdopt.path import NUMBERS
from sdopt.tables import first_upper

ON_ENGINE = {"engine_bf16": "on our engine", "whole_path_engine": "by the whole path on it", "whole_path_engine_fp8": "by that in fp8"}
BUSY = 0.9  # of the time of a UNet's calls: a GPU that works for less has been waiting


def headline(result):
    """One sentence on a path study: its two ends, and the recommended path where it was measured."""
    first, last = figures.ends_of(result)
    said = (
        f"The same prompt and the same noise, by the baseline in {_took(first)} and "
        f"at the end of the path in {_took(last)}: {_times_faster(last, first)} on "
        f"{result['environment']['gpu'] or result['environment']['cpu']}."
    )
    for row in result["rows"]:
        if row["id"] == "recommended" and row["status"] == "ok":
            said += f" {first_upper(row['label'])} takes {_took(row)}: {_times_faster(row, first)} than the baseline."
    if result["settings"]["weights"] == "random":
        said += " The weights are random: the times are the model's, the pictures are noise."
    return said


def race(result):
    """One sentence on a study of the engine: seconds a picture by the baseline, the fastest that was compiled, and the engine."""
    rows = {row["id"]: row for row in result["rows"] if row["status"] == "ok"}
    first, _ = figures.ends_of(result)
    compiled = [row for i, row in rows.items() if i.startswith("compile_")]
    named = [(min(compiled, key=_median), "compiled")] if compiled else []
    named += [(rows[i], words) for i, words in ON_ENGINE.items() if i in rows]
    told = [f"{_took(first)} by the baseline", *(f"{_took(row)} {words} ({_speedup(row, first):.1f}x)" for row, words in named)]
    return f"{figures.described(result)}: {', '.join(told)}."


def budget(result):
    """Where the time of the whole path goes, and so how much faster work on anything but the UNet could make it.

    On a GPU also what its UNet's kernels take, by kind, and before it is compiled how long the GPU waits for work.
    """
    first, row = figures.ends_of(result)
    stages = {stage: 1e3 * seconds for stage, seconds in figures.stages_s(row).items()}
    beside = ", ".join(f"{figures.NAMES[i]} {stages[i]:.0f}" for i in stages if i != "unet")
    told = (
        f"At the end of the path a picture takes {1e3 * _median(row):.0f} ms, of which the UNet's "
        f"{row['stages_ms']['unet_calls']} calls take {stages['unet']:.0f} ({beside}). Were nothing left but these calls "
        f"as they are, the path would be {1e3 * _median(first) / stages['unet']:.1f} times faster than the "
        f"baseline; it is {_times_faster(row, first)}."
    )
    return " ".join([told, *_kernels(row), *_waiting(result["rows"])])


def _kernels(row):
    if not row.get("unet_kernels"):
        return []
    counted = figures.profiled_calls(row)
    kinds = {kind: sum(n * call["ms"][kind] for n, call in counted) for kind in row["unet_kernels"][0]["ms"]}
    each = " and ".join(
        f"{n} of {sum(call['ms'].values()):.1f} ms on {_samples(call['samples'])}" for n, call in counted
    )
    by_kind = ", ".join(f"{kind} {ms:.0f}" for kind, ms in kinds.items())
    return [
        f"The GPU's kernels are busy for {sum(kinds.values()):.0f} ms of the calls' time, {each}; by kind: {by_kind}."
    ]


def _waiting(rows):
    """What the compiler has to win beside faster kernels: the time the GPU waits for Python, in the last row without it."""
    eager = [row for row in rows if row.get("unet_kernels") and row["id"] in NUMBERS and not row["as_run"]["compiled"]]
    if not eager:
        return []
    row = eager[-1]
    busy, unet = figures.kernels_ms(row), row["stages_ms"]["unet"]
    if busy > BUSY * unet:
        return []
    return [
        f"Uncompiled, the GPU waits for its work: at {row['id']} the UNet's calls take {unet:.0f} ms, and the kernels are "
        f"busy for {busy:.0f} of them."
    ]


def _samples(n):
    return f"{n} sample{'s' * (n > 1)}"


def _median(row):
    return row["latency_s"]["median"]


def _took(row):
    return figures.seconds(_median(row))


def _times_faster(row, other):
    return f"{_speedup(row, other):.1f} times faster"


def _speedup(row, other):
    return results.compare(row, other, about=SUBJECTS)["speedup"]
