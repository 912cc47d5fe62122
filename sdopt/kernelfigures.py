"""Fused kernels: how often they and what they replace go over memory, and how fast, from counts and measured rows."""

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sdopt import figures
from sdopt.figures import INK, QUIET, SERIES

WAYS = {"eager": SERIES[0], "compiled": SERIES[2], "ours": SERIES[1]}


def passes(counted):
    """A pair of bars a fusion, for a notebook: its operations one after another, and one kernel for all of them.

    `counted` is {name: ({operation: passes}, passes of the kernel)}, a pass being as many bytes as the result has.
    Introduced in notebooks/11_fused_kernels.
    """
    figure = figures.Plot(figsize=(9, 1.2 + 0.62 * len(counted)))
    axes, names = figure.subplots(), []
    for name, (operations, kernel) in counted.items():
        y, left = len(names), 0.0
        for operation, width in operations.items():
            axes.barh(y, width, left=left, height=0.7, color=SERIES[0], edgecolor="white", linewidth=1.5)
            axes.text(left + width / 2, y, operation, ha="center", va="center", fontsize=8, color="white")
            left += width
        axes.text(left, y, f" {left:.1f}", va="center", color=INK)
        axes.barh(y + 1, kernel, height=0.7, color=SERIES[1])
        axes.text(kernel, y + 1, f" {kernel:.1f}", va="center", color=INK)
        names += [name, ""]
    figures.rows_down(axes, names)
    axes.set_xlim(0, 1.1 * max(sum(operations.values()) for operations, _ in counted.values()))
    axes.set_xlabel("passes over memory: bytes read and written / bytes of the result", color=QUIET)
    handles = [Patch(color=SERIES[0], label="operation by operation"), Patch(color=SERIES[1], label="one fused kernel")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def of_a_copy(rows):
    """A line a kernel and shape, for a notebook: how much of a copy's speed ours, eager PyTorch and the compiler reach.

    `rows` are (where it was measured, row of the study `kernels`, part "fusions"), {"kernel", "shape", "seconds"}.
    Introduced in notebooks/11_fused_kernels.
    """
    figure = figures.Plot(figsize=(9, 1.2 + 0.28 * len(rows)))
    axes, names = figure.subplots(), []
    for y, (where, row) in enumerate(rows):
        for way, colour in WAYS.items():
            axes.plot(100 * row["seconds"]["copy"] / row["seconds"][way], y, "o", color=colour)
        names.append(f"{row['kernel']}, {' x '.join(map(str, row['shape']))} ({where})")
    figures.rows_down(axes, names)
    axes.set_xlim(left=0)
    axes.axvline(100, color=QUIET, linewidth=1)
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("% of the speed of a copy that moves as many bytes", color=QUIET)
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=way) for way, colour in WAYS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(WAYS), frameon=False, fontsize=9)
    return figure
