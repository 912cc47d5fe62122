"""The figures of the studies whose rows share pipelines: batch after batch, the HPML project's rows, what a step is worth."""

import textwrap
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sdopt import figures, gridtables, results
from sdopt.figures import INK, QUIET, SERIES
from sdopt.gridtables import GIB
from sdopt.peerfigures import KINDS

WAYS = {  # colour, marker and name
    "eager": (KINDS["eager"][0], "s", "eager"),
    "compiled": (KINDS["compiled"][0], "o", "torch.compile, compiled for each batch"),
    "engine": (KINDS["engine"][0], "^", "our engine"),
}
OURS, THEIRS = SERIES[0], SERIES[1]
PLACES = {"gain": (SERIES[0], -0.13, 1.02), "last": (SERIES[5], 0.13, 1.1)}  # colour, below its row, where its number is


def sources(result_path):
    """The files that such a figure is drawn from: the result, and for the HPML project's rows what it published."""
    result = results.read(result_path)
    beside = gridtables.kind(result) == "hpml" and gridtables.published(result["study"])["by"]
    return [Path(result_path), *([gridtables.PUBLISHED] if beside else [])]


def batches_figure(result_path, target):
    """Draw a study of batches into the PNG `target`: pictures a second and seconds a call, a point a timed run, and memory.

    Raises UserError for a result file that is none, or a `target` that cannot be written. Introduced in
    notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    ways = {way: by_batch for way, by_batch in gridtables.grid(result).items() if by_batch}
    batches = sorted({batch for by_batch in ways.values() for batch in by_batch})
    figure = figures.Plot(figsize=(12, 5.2))
    panels = figure.subplots(1, 3)
    values = {"images a second": lambda batch, s: batch / s, "seconds a call": lambda batch, s: s}
    for k, (way, by_batch) in enumerate(ways.items()):
        beside, rows = (k - 1) * 0.1, {batch: row for batch, row in by_batch.items() if row["status"] == "ok"}
        for axes, (name, value) in zip(panels, values.items(), strict=False):
            _runs(axes, way, beside, {batch: row["latency_s"] for batch, row in rows.items()}, value)
            axes.set_title(f"{name}, every timed run", fontsize=11, color=INK)
        memory = {batch: row["peak_memory_bytes"] / GIB for batch, row in rows.items()}
        _line(panels[2], way, memory, beside, WAYS[way][1])
        _failures(panels[0], way, beside, by_batch)
    panels[2].set_title("peak memory, GiB", fontsize=11, color=INK)
    panels[1].set_yscale("log")
    _plain(panels[1].yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), panels[1].get_ylim())
    for axes in panels:
        by_batch_axis(axes, batches)
    for axes in panels[::2]:
        axes.set_ylim(bottom=0)
    handles = [Line2D([], [], color=WAYS[w][0], marker=WAYS[w][1], markersize=6, label=WAYS[w][2]) for w in ways]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figures.title(figure, "How many pictures at once", result)
    figures.save(figure, target, [result_path])


def by_batch_axis(axes, batches):
    """Pictures a call on the x-axis of `axes`, a tick at each of `batches`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("pictures a call", color=QUIET)
    figures.open_axes(axes)


def _line(axes, way, points, beside, marker=None):
    """A line through `points`, {batch: value}, moved a little sideways, so that those of another way can be seen."""
    xs = [batch * 2**beside for batch in points]
    axes.plot(xs, points.values(), color=WAYS[way][0], marker=marker, linewidth=1.2, markersize=5)


def _runs(axes, way, beside, latencies, value):
    """A point a timed run, side by side in the order they were made, and a line through the medians."""
    colour, marker, _ = WAYS[way]
    _line(axes, way, {batch: value(batch, latency["median"]) for batch, latency in latencies.items()}, beside)
    for batch, latency in latencies.items():
        runs = latency["runs"]
        xs = [batch * 2 ** (beside + 0.08 * (k / max(1, len(runs) - 1) - 0.5)) for k in range(len(runs))]
        ys = [value(batch, seconds) for seconds in runs]
        axes.plot(xs, ys, marker, color=colour, markersize=4.5, alpha=0.6, markeredgewidth=0, linestyle="")


def _failures(axes, way, beside, by_batch):
    for batch, row in by_batch.items():
        if row["status"] != "ok":
            words = f"x  {WAYS[way][2].partition(',')[0]}: {gridtables.reason(row)}"
            axes.text(
                batch * 2 ** (beside * 1.6), 0.02, words, transform=axes.get_xaxis_transform(), rotation=90, va="bottom",
                ha="center", fontsize=8.5, color=WAYS[way][0],
            )  # fmt: skip


def _plain(axis, ticks, limits):
    """Ticks of a logarithmic axis at round numbers within `limits`."""
    axis.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def hpml_figure(result_path, target):
    """Draw the HPML project's rows into the PNG `target`: time and memory, ours and the published, by their baselines.

    Raises UserError as `batches_figure` does. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    other, rows, measured = gridtables.published(result["study"]), result["rows"], gridtables.measured(result)
    figure = figures.Plot(figsize=(12, 2.1 + 0.52 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    base = measured.get("baseline")
    for y, row in enumerate(rows):
        i = row["id"]
        if row["status"] != "ok":
            words = textwrap.shorten(row["status"], 90, placeholder=" …")
            left.text(0.02, y, words, va="center", fontsize=8, color=QUIET, style="italic")
        elif base:
            gained = gridtables.gain(row, base)
            speedup = gained["speedup"]
            label = f"{speedup:.2f}x   {figures.seconds(row['latency_s']['median'])}"
            _pair(left, y, 0, speedup, label, OURS)
            if base is not row:
                spread = [[speedup - gained["low"]], [gained["high"] - speedup]]
                left.errorbar(speedup, y - 0.19, xerr=spread, color=INK, capsize=2, linewidth=1)
            share = row["peak_memory_bytes"] / base["peak_memory_bytes"]
            _pair(right, y, 0, share, f"{share:.2f}x   {row['peak_memory_bytes'] / GIB:.1f} GiB", OURS)
        if i in other["s"]:
            share = other["s"]["baseline"] / other["s"][i]
            _pair(left, y, 1, share, f"{share:.2f}x   {other['s'][i]:.3f} s", THEIRS)
        if i in other["GB"]:
            share = other["GB"][i] / other["GB"]["baseline"]
            _pair(right, y, 1, share, f"{share:.2f}x   {other['GB'][i]:g} GB", THEIRS)
    figures.rows_down(left, [f"{row['id']}\n{row['label']}" for row in rows])
    left.tick_params(axis="y", labelsize=8)
    for axes, name in (
        (left, "times faster than the baseline of the same machine"),
        (right, "peak memory, that of the baseline is 1"),
    ):
        axes.axvline(1, color=QUIET, linewidth=0.8, linestyle=":", zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, axes.dataLim.x1 * 1.35 if base or other["s"] else 1)
        axes.set_xlabel(name, color=QUIET)
    where = result["environment"]["gpu"] or result["environment"]["cpu"]
    handles = [
        Patch(color=OURS, label=f"measured here, {where}"),
        Patch(facecolor=THEIRS, label=f"published, {other['by']}", hatch="//", edgecolor="white"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figures.title(figure, "The HPML project's rows, here and as it published them", result)
    figures.save(figure, target, sources(result_path))


def _pair(axes, y, k, width, label, colour):
    """One of the two bars of a row: ours above, the published one hatched below."""
    at = y + (0.19 if k else -0.19)
    axes.barh(at, width, height=0.34, color=colour, edgecolor="white", linewidth=0, hatch="//" if k else None)
    axes.annotate(
        label, (width, at), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=INK if not k else QUIET,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def attribution_figure(result_path, target):
    """Draw what each step is worth into the PNG `target`: its gain in its place and its gain when left out of the whole.

    Raises UserError as `batches_figure` does. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    told = [step for step in gridtables.attributed(result) if step["step"] != "baseline_fp32"]
    figure = figures.Plot(figsize=(12, 1.9 + 0.55 * len(told)))
    axes = figure.subplots()
    for y, step in enumerate(told):
        for key, (colour, dy, x) in PLACES.items():
            gained = step[key]
            if not gained:
                _beside(axes, x, y, "–" if step["idle"] else "?", colour)
                continue
            axes.plot([1, gained["speedup"]], [y + dy] * 2, color=colour, linewidth=1.5, alpha=0.5)
            spread = [[gained["speedup"] - gained["low"]], [gained["high"] - gained["speedup"]]]
            axes.errorbar(
                gained["speedup"], y + dy, xerr=spread, fmt="o", color=colour, markersize=7, capsize=3, linewidth=1.2,
                markerfacecolor=colour if gained["clear"] else "white",
            )  # fmt: skip
            _beside(axes, x, y, f"{gained['speedup']:.2f}x", colour)
        if not (step["gain"] or step["last"]):
            axes.text(1.01, y, _nothing(step, result), va="center", fontsize=9, color=QUIET, style="italic")
    for (colour, _, x), words in zip(PLACES.values(), ("in its\nplace", "in the\nwhole"), strict=True):
        _beside(axes, x, -0.8, words, colour)
    axes.axvline(1, color=INK, linewidth=0.8)
    figures.rows_down(axes, [step["step"] for step in told])
    axes.set_xscale("log")
    _plain(axes.xaxis, (0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5, 7, 10), axes.get_xlim())
    axes.set_xlabel("times faster with the step than without it (logarithmic); ratio of medians, p20 to p80", color=QUIET)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=colour, marker="o", markersize=7, label=label)
                for (colour, *_), label in zip(
                    PLACES.values(),
                    ("in its place: upon the steps before it", "in the whole: the path with it against the path without it"),
                    strict=True,
                )
            ),
            Line2D([], [], color=QUIET, marker="o", markersize=7, mfc="white", linestyle="", label="within the spread"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figures.title(figure, "What each step is worth, in its place and as if it came last", result)
    figures.save(figure, target, [result_path])


def _beside(axes, x, y, words, colour):
    """Words beside the axes at row `y`."""
    axes.text(x, y, words, transform=axes.get_yaxis_transform(), va="center", fontsize=10, color=colour)


def _nothing(step, result):
    if step["idle"]:
        return "changes nothing here"
    failed = [row["id"] for row in result["rows"] if row["status"] != "ok" and step["step"] in (*row["upto"], *row["without"])]
    return f"{failed[0]} failed" if failed else "not measured"


FIGURES = {"batches": batches_figure, "hpml": hpml_figure, "attribution": attribution_figure}
