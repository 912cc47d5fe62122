"""The figure of a study of stages: each stage of each row under the roof of the ceilings that were measured beside it."""

from matplotlib.lines import Line2D

from sdopt import figures, results, stagetables
from sdopt.figures import INK, NAMES, QUIET, SERIES
from sdopt.path import NUMBERS

WAYS = {
    "eager": (SERIES[1], "eager"),
    "graph": (SERIES[2], "in a CUDA graph"),
    "fused": (SERIES[0], "compiled or on our engine"),
}
NEAR = 14  # pixels: points as close as this share one label
DRAWN = ("text_encoder", "unet", "vae")  # a scheduler calculates no product
BESIDE = {"engine_bf16": "e", "whole_path_engine": "E"}  # the numbers of rows that are no step


def roofline_figure(result_path, target):
    """Draw a study of stages into the PNG `target`: TFLOP/s against FLOPs a byte, a panel a stage, a marker a row.

    Filled markers are measured, hollow ones predicted; lines are the ceilings, medians over the rows. Raises UserError for a
    result file that is none, or a `target` that cannot be written. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    numbers = {step: str(n) for step, n in NUMBERS.items()} | BESIDE
    rows = {numbers[row["id"]]: row for row in result["rows"] if row["status"] == "ok"}
    seen = {n: {stage["stage"]: stage for stage in stagetables.stages(row)} for n, row in rows.items()}
    figure = figures.Plot(figsize=(13, 6.6))
    panels = figure.subplots(1, len(DRAWN), sharey=True)
    for axes, stage in zip(panels, DRAWN, strict=True):
        figures.logarithmic(axes)
        axes.set_title(NAMES[stage], fontsize=11, color=INK)
        points = {n: _point(stages[stage]) for n, stages in seen.items() if stages[stage]["flops"]}
        for x, measured, predicted, colour in points.values():
            axes.plot([x, x], [measured, predicted], color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(x, predicted, "o", color=colour, markerfacecolor="white", markersize=6)
            axes.plot(x, measured, "o", color=colour, markersize=7)
        if points:
            xs, *ys, _ = zip(*points.values(), strict=True)
            axes.set_xlim(min(xs) / 2, max(xs) * 5)
            formats = {name for row in rows.values() for name in row["roofline"]["stages"][stage]["flops"]}
            _roof(axes, list(rows.values()), formats)
    figure.draw_without_rendering()  # so that places are known
    for axes, stage in zip(panels, DRAWN, strict=True):
        _number(axes, {n: _point(stages[stage]) for n, stages in seen.items() if stages[stage]["flops"]})
    panels[0].set_ylabel("TFLOP/s", color=QUIET)
    panels[1].set_xlabel(
        "FLOPs a byte; both scales are logarithmic\n" + ",  ".join(f"{n} {row['id']}" for n, row in rows.items()), color=QUIET
    )
    ways = [way for way in WAYS if any(s["way"] == way for stages in seen.values() for s in stages.values())]
    handles = [Line2D([], [], color=WAYS[w][0], marker="o", linestyle="", label=WAYS[w][1]) for w in ways]
    handles += [
        Line2D([], [], color=QUIET, marker="o", markerfacecolor="white", linestyle="", label="hollow: as predicted"),
        Line2D([], [], color=INK, linewidth=1.2, label="ceilings: a large product, a large copy"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figures.title(figure, "How far from the ceilings: each stage at each step", result)
    figures.save(figure, target, [result_path])


def _point(seen):
    """FLOPs a byte, TFLOP/s measured and predicted, and the colour of how it ran."""
    predicted = seen["flops"] / seen["predicted_ms"] / 1e9
    return seen["flops"] / seen["bytes"], seen["flops_per_s"] / 1e12, predicted, WAYS[seen["way"]][0]


def _roof(axes, rows, formats):
    """The ceilings that stand over a panel: what a copy allows at each intensity, up to the product in each format."""
    rates, moved, _ = stagetables.ceilings(rows)
    low, high = axes.get_xlim()
    for name in formats:
        top, corner = rates[name] / 1e12, rates[name] / moved
        axes.plot([min(max(corner, low), high), high], [top, top], color=INK, linewidth=1.2)
        under = any(1 < rates[other] / rates[name] < 1.4 for other in formats)  # no room for words between the two
        axes.annotate(
            f"{name}, {top:.3g} TFLOP/s", (high, top), xytext=(-2, -3 if under else 3), textcoords="offset points",
            ha="right", va="top" if under else "bottom", fontsize=8, color=INK,
        )  # fmt: skip
    corner = min(max(rates[name] for name in formats) / moved, high)
    if corner > low:
        axes.plot([low, corner], [low * moved / 1e12, corner * moved / 1e12], color=INK, linewidth=1.2)
        axes.annotate(
            f"a copy, {moved / 1e9:,.0f} GB/s", (low, low * moved / 1e12), xytext=(4, 0), textcoords="offset points",
            ha="left", va="top", fontsize=8, color=INK,
        )  # fmt: skip


def _number(axes, points):
    """The numbers of the rows beside their measured points, one label for those that lie on each other."""
    groups = []
    for n, (x, y, *_) in points.items():
        at = axes.transData.transform((x, y))
        near = next((g for g in groups if abs(g["at"] - at).max() < NEAR), None)
        if near:
            near["numbers"].append(n)
        else:
            groups.append({"numbers": [n], "x": x, "y": y, "at": at})
    figures.label(axes, [group | {"label": _listed(group["numbers"])} for group in groups])


def _listed(numbers):
    """Numbers as words, three or more in a row as their ends: "2, 4-9, e"."""
    runs = []
    for n in numbers:
        if runs and n.isdigit() and runs[-1][-1].isdigit() and int(n) == int(runs[-1][-1]) + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)
