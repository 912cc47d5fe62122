"""The figures of a peer study in a result file: all peers side by side, and the attention backends alone."""

import textwrap

from matplotlib.patches import Patch

from sdopt import figures, results
from sdopt.figures import INK, QUIET, SERIES

REFERENCE = "eager_bf16"
BACKENDS = {
    "eager_bf16": "PyTorch's pick",
    "sdpa_cudnn": "cuDNN",
    "sdpa_flash": "flash",
    "sdpa_efficient": "memory-efficient",
    "sdpa_math": "math",
    "xformers": "xformers",
}
KINDS = {  # colour and name of the bars
    "eager": (SERIES[4], "eager"),
    "compiled": (SERIES[0], "compiled"),
    "pinned": (SERIES[2], "eager, one attention kernel"),
    "engine": (SERIES[1], "our engine"),
}


def peers_figure(result_path, target):
    """Draw a peer study into the PNG `target`: a bar a peer, its speed against eager bf16, and its first calls.

    Raises UserError for a result file that is none, or a `target` that cannot be written. Introduced in
    notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows = result["rows"]
    bars = {row["id"]: row["latency_s"]["median"] for row in rows if row["status"] == "ok"}
    furthest = max((row["latency_s"]["p80"] for row in rows if row["id"] in bars), default=1.0)
    figure, axes = _bars(rows, bars, [row["id"] for row in rows], 1.25 * furthest)
    for y, row in enumerate(rows):
        if row["id"] not in bars:
            continue
        latency = row["latency_s"]
        spread = [[latency["median"] - latency["p20"]], [latency["p80"] - latency["median"]]]
        axes.errorbar(latency["median"], y, xerr=spread, fmt="o", color=INK, markersize=4, capsize=3, linewidth=1.2)
        label = figures.seconds(latency["median"]) + _ratio(bars, row)
        _beside(axes, latency["p80"], y, label)
        axes.text(1.01, y, _first_calls(row), transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=QUIET)
    axes.text(1.01, -0.6, "first call", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9, color=QUIET)
    axes.set_xlabel(f"seconds a picture, median and p20 to p80; x: times faster than {REFERENCE}", color=QUIET)
    kinds = {kind: KINDS[kind] for kind in KINDS if kind in map(_kind, rows)}
    handles = [Patch(color=colour, label=name) for colour, name in kinds.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    about = "Our engine beside others' ways" if "engine" in result["study"] else "Others' ways"
    figures.title(figure, f"{about} to run the same model, side by side", result)
    figures.save(figure, target, [result_path])


def attention_figure(result_path, target):
    """Draw what a UNet call takes with each attention backend of a peer study into the PNG `target`.

    By the GPU's kernels where they were profiled: the call itself may wait for Python to start them, whoever computes.

    Raises UserError as `peers_figure` does. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows = sorted((r for r in result["rows"] if r["id"] in BACKENDS), key=lambda row: list(BACKENDS).index(row["id"]))
    done = [row for row in rows if row["status"] == "ok"]
    took = {row["id"]: row["stages_ms"]["unet"] / row["stages_ms"]["unet_calls"] for row in done}
    profiled = bool(done) and all(row.get("unet_kernels") for row in done)
    bars = {row["id"]: figures.kernels_ms(row) / row["stages_ms"]["unet_calls"] for row in done} if profiled else took
    reach = 1.35 * max((*took.values(), *bars.values()), default=1.0)
    figure, axes = _bars(rows, bars, [BACKENDS[row["id"]] for row in rows], reach)
    for y, row in enumerate(rows):
        if row["id"] in bars:
            ran = " and ".join(row.get("as_run", {}).get("attention") or ())
            label = f"{bars[row['id']]:.1f} ms" + _ratio(bars, row) + (f"   ran: {ran}" if ran else "")
            if profiled:
                axes.barh(y, took[row["id"]], height=0.62, fill=False, edgecolor=QUIET, linewidth=0.8)
            _beside(axes, max(bars[row["id"]], took[row["id"]]), y, label)
    what = "of the GPU's kernels in a UNet call (outline: of the whole call)" if profiled else "a UNet call, mean of one picture's"
    axes.set_xlabel(f"milliseconds {what}; x: times faster than PyTorch's pick", color=QUIET)
    figures.title(figure, "Who computes attention: a UNet call by backend", result)
    figures.save(figure, target, [result_path])


def _bars(rows, lengths, names, reach):
    """A figure with a bar for each of `rows` that has a length, the reason for each that failed; as wide as `reach`."""
    figure = figures.Plot(figsize=(12, 1.9 + 0.42 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row["id"] in lengths:
            axes.barh(y, lengths[row["id"]], height=0.62, color=KINDS[_kind(row)][0])
        else:
            reason = textwrap.shorten(row["status"], 120, placeholder=" …")
            axes.text(reach * 0.01, y, reason, va="center", fontsize=9, color=QUIET, style="italic")
    figures.rows_down(axes, names)
    axes.set_xlim(0, reach)
    return figure, axes


def _kind(row):
    if row["id"] in BACKENDS and row["id"] != REFERENCE:
        return "pinned"
    if "engine" in row["id"]:
        return "engine"
    return "compiled" if row.get("as_run", {}).get("compiled") or row.get("first_calls") else "eager"


def _ratio(lengths, row):
    other = lengths.get(REFERENCE)
    return f"   {other / lengths[row['id']]:.2f}x" if other and row["id"] != REFERENCE else ""


def _beside(axes, x, y, label):
    axes.annotate(label, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=INK)


def _first_calls(row):
    calls = row.get("first_calls")
    if not calls:
        return figures.seconds(row["first_call_s"])
    cold = f"{figures.seconds(calls['cold_s'])}, " if calls["cold_s"] else ""
    return f"{cold}warm {figures.seconds(calls['warm_s'])}"
