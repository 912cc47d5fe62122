"""The figure of a quality study: quality against latency, every row with its interval, and the rows that none beats."""

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from sdopt import figures, levels, results
from sdopt.figures import INK, QUIET, SERIES

FAMILIES = {  # colour and name
    "path": (SERIES[0], "the path, step upon step"),
    "alone": (SERIES[4], "each step alone"),
    "int8": (SERIES[3], "int8, filtered and everywhere"),
    "engine": (SERIES[5], "our engine"),
    "schedulers": (SERIES[1], "schedulers by steps"),
    "guidance": (SERIES[2], "guidance, cut off or in an interval"),
    "noise": (QUIET, "yardsticks: bf16 alone, another seed"),
}


def front_figure(result_path, target):
    """Draw a quality study into the PNG `target`: prompts all right against latency, with 95 % intervals.

    The rows that no other beats are joined and named, the three levels marked. Raises UserError for a result file that is
    none, or a `target` that cannot be written.
    """
    result = results.read(result_path)
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    figure = figures.Plot(figsize=(12, 7))
    axes = figure.subplots()
    for row in rows:
        share = row["quality"][levels.WHOLE]
        spread = [[100 * (share["value"] - share["low"])], [100 * (share["high"] - share["value"])]]
        colour, _ = FAMILIES[row["family"]]
        axes.errorbar(
            *_point(row), yerr=spread, fmt="o", color=colour, markersize=5, capsize=2, linewidth=0.8, alpha=0.85
        )
    front = levels.pareto(result)
    if front:
        axes.step(*zip(*map(_point, front), strict=True), where="post", color=INK, linewidth=1, zorder=0)
    ids = {row["id"] for row in result["rows"] if row["status"] == "ok"}
    marked = levels.recommended(result) if {levels.REFERENCE, levels.YARDSTICKS[0]} <= ids else {}
    _name(axes, front, marked)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: figures.seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("latency, prompt to picture, median (logarithmic)", color=QUIET)
    axes.set_ylabel("prompts of which everything is in the picture, %", color=QUIET)
    figures.open_axes(axes)
    shown = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    handles = [Line2D([], [], color=FAMILIES[f][0], marker="o", linestyle="", label=FAMILIES[f][1]) for f in shown]
    handles.append(Line2D([], [], color=INK, linewidth=1, label="no row is as fast and better"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figures.title(figure, "Quality against latency", result)
    figures.save(figure, target, [result_path])


def _point(row):
    return row["latency_s"]["median"], 100 * row["quality"][levels.WHOLE]["value"]


def _name(axes, front, marked):
    """Number the front's rows and the levels, the fastest first, and name them where no row is: slow and bad."""
    named = {row["id"]: row for row in (*front, *marked.values())}
    names = []
    for k, (i, row) in enumerate(sorted(named.items(), key=lambda item: _point(item[1])), 1):
        here = [level for level, chosen in marked.items() if chosen["id"] == i]
        names.append(f"{k}  {i}" + (f": {', '.join(here)}" if here else ""))
        beside = (0, 10) if here else (-7, -3)  # above its ring, or left of the point: the front's lie above one another
        axes.annotate(
            str(k), _point(row), xytext=beside, textcoords="offset points", ha="center", fontsize=9, color=INK,
            fontweight="bold" if here else "normal",
        )  # fmt: skip
        if here:
            axes.plot(*_point(row), "o", markersize=13, markerfacecolor="none", markeredgecolor=INK)
    axes.text(0.99, 0.03, "\n".join(names), transform=axes.transAxes, ha="right", va="bottom", fontsize=9, color=INK)
