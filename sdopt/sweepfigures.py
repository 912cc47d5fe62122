"""The figures of a quality study's sweeps: schedulers by their steps, and guidance by where it begins and ends.

Each against its cost in two panels: how many prompts are all right, and how far the pictures are from renders.
"""

from operator import itemgetter

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from sdopt import figures, levels, results
from sdopt.figures import INK, QUIET, SERIES

PANELS = (
    (levels.WHOLE, 100, "prompts of which everything is in the picture, %"),
    ("frechet", 1, "Frechet distance to renders"),
)
WIDE = 10  # between a panel's largest and smallest number: beyond it, its axis is logarithmic


def schedulers_figure(result_path, target):
    """Draw the schedulers of a quality study, each at its numbers of steps, into the PNG `target`.

    Raises UserError for a result file that is none, or a `target` that cannot be written.
    """
    result, series = results.read(result_path), {}
    for row in rows_of(result, "schedulers"):
        how = result["settings"] | row["settings"]
        series.setdefault(how["scheduler"], []).append((how["steps"], "", row))
    _draw(result, result_path, target, series, "Schedulers by steps", "steps (logarithmic)", "log")


def guidance_figure(result_path, target):
    """Draw guidance that is cut off, and in an interval, of a quality study into the PNG `target`; labels: where it ends.

    Raises UserError for a result file that is none, or a `target` that cannot be written.
    """
    result, series = results.read(result_path), {}
    for row in rows_of(result, "guidance"):
        start, stop = row["settings"].get("start", 0.0), row["settings"].get("stop", row["settings"].get("cutoff", 1.0))
        name = f"from {start:.0%} of the steps on, and the first" if start else "from the first step on"
        series.setdefault(name, []).append((row["unet_samples"], f"{stop:.0%}", row))
    _draw(result, result_path, target, series, "Guidance by where it begins and ends", "UNet samples a picture")


def rows_of(result, family):
    """The measured rows of a sweep, "schedulers" or "guidance"."""
    return [row for row in result["rows"] if row["status"] == "ok" and row["family"] == family]


def _draw(result, result_path, target, series, words, cost, scale="linear"):
    """A line a series, {name: [(cost, label, row)]}, in each of PANELS, beside the baseline and its interval."""
    figure = figures.Plot(figsize=(12, 5.2))
    base = figures.baseline(result["rows"])
    for axes, (measure, times, said) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        shown = [row["quality"][measure]["value"] for points in series.values() for *_, row in points if row["quality"][measure]]
        _band(axes, base and base["quality"][measure], times)
        for colour, points in zip(SERIES, series.values(), strict=False):
            seen = [(x, label, found) for x, label, row in sorted(points, key=itemgetter(0)) if (found := row["quality"][measure])]
            x, y = [x for x, *_ in seen], [times * found["value"] for *_, found in seen]
            spread = [[times * abs(found[end] - found["value"]) for *_, found in seen] for end in ("low", "high")]
            axes.errorbar(x, y, yerr=spread, fmt="o-", color=colour, markersize=4, capsize=2, linewidth=1.1, alpha=0.9)
            for place, value, (_, label, _) in zip(x, y, seen, strict=True):
                axes.annotate(label, (place, value), xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour)
        axes.set_xscale(scale)
        costs = sorted({x for points in series.values() for x, *_ in points})
        axes.set_xticks(costs, costs, rotation=60 if len(costs) > 12 else 0, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        if shown and 0 < min(shown) * WIDE < max(shown):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted("{x:g}")
            said += " (logarithmic)"
        axes.set_xlabel(cost, color=QUIET)
        axes.set_ylabel(said, color=QUIET)
        figures.open_axes(axes)
    handles = [Line2D([], [], color=c, marker="o", label=name) for c, name in zip(SERIES, series, strict=False)]
    handles += [Line2D([], [], color=INK, linewidth=1, linestyle="--", label="the baseline and its interval")] if base else []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False, fontsize=9)
    figures.title(figure, words, result)
    figures.save(figure, target, [result_path])


def _band(axes, found, times):
    if found:
        axes.axhspan(times * found["low"], times * found["high"], color=QUIET, alpha=0.15, linewidth=0)
        axes.axhline(times * found["value"], color=INK, linewidth=1, linestyle="--")
