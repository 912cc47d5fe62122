"""8-bit floats for a notebook: where their numbers lie, how far rounding moves one, what layers lose and gain by it."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from sdopt import figures
from sdopt.figures import INK, QUIET, SERIES

WAYS = {"bf16": SERIES[0], "row": SERIES[1], "tensor": SERIES[3]}
CALLED = {"bf16": "bf16", "row": "fp8, a scale a row", "tensor": "fp8, a scale a tensor"}
KINDS = {  # by what the name of a layer holds
    "attn1": "self-attention\nq, k, v",
    "attn1.to_out": "self-attention\noutput",
    "attn2.to_q": "cross-attention\nq",
    "attn2.to_out": "cross-attention\noutput",
    "ff.net.0": "feed-forward,\nfirst half",
    "ff.net.2": "feed-forward,\nsecond half",
    "resnets": "residual block,\nconvolutions",
}
SWEPT = {"self-attention": "o", "cross-attention": "s", "feed-forward 1": "^", "feed-forward 2": "v", "output": "x"}
ROUNDED = dict.fromkeys(SWEPT, "tensor") | dict.fromkeys(("self-attention", "feed-forward 1"), "row")  # by the engine's default
CONVOLVED = {"sdxl": "o", "sd15": "s"}


def kind_of(layer: str) -> str:
    """Which of KINDS the layer of that name is. Introduced in notebooks/13_fp8."""
    return max((kind for kind in KINDS if kind in layer), key=len)


def whole(row: Mapping, way: str) -> float:
    """Seconds of a layer and of what rounds for it, a row of the study `fp8-shapes`: `way` "bf16", "row" or "tensor"."""
    seconds = row["seconds"]
    if row["before"]:
        return seconds[way] + seconds[f"before_{way}"]
    return seconds[way] + (0 if way == "bf16" else seconds[f"pass_{way}"])


def multiplications(row: Mapping) -> int:
    """Of a layer of the study `fp8-shapes`: a linear one, or a 3x3 convolution, at the borders of its images, too."""
    rows = row["rows"] if "rows" in row else 9 * row["samples"] * row["lines"] ** 2
    return rows * row["inputs"] * row["outputs"]


def number_lines(formats: Mapping[str, Sequence[float]]):
    """The numbers of each format as ticks, the largest at 1: all of them on a line, and those above 0 by powers of two.

    `formats`: {name: its finite numbers}. Introduced in notebooks/13_fp8.
    """
    figure = figures.Plot(figsize=(9, 1.4 + 0.9 * len(formats)))
    line, powers = figure.subplots(2, 1)
    for y, (colour, numbers) in enumerate(zip(SERIES, formats.values())):
        largest = max(numbers)
        ticks = sorted({number / largest for number in numbers})
        line.vlines(ticks, y - 0.35, y + 0.35, color=colour, linewidth=0.7)
        powers.vlines([tick for tick in ticks if tick > 0], y - 0.35, y + 0.35, color=colour, linewidth=0.7)
    for axes in (line, powers):
        figures.rows_down(axes, list(formats))
    powers.set_xscale("log", base=2)
    line.set_xlabel("number / the format's largest", color=QUIET)
    powers.set_xlabel("the same above 0, by powers of two", color=QUIET)
    return figure


def by_size(sizes: Sequence[float], errors: Mapping[str, Sequence[float]]):
    """A curve a format: what rounding costs a number (RMS, relative to it) by its size, the row's largest being 1.

    Introduced in notebooks/13_fp8.
    """
    figure = figures.Plot(figsize=(9, 3.2))
    axes = figure.subplots()
    for colour, (name, off) in zip(SERIES, errors.items()):
        axes.plot(sizes, [100 * value for value in off], color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 200)
    axes.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlabel("size of a number / the largest of its row", color=QUIET)
    axes.set_ylabel("error / number", color=QUIET)
    axes.legend(frameon=False, fontsize=9)
    return figure


def by_layer(cases: Sequence[tuple[str, Sequence[Mapping]]]):
    """A dot a layer and way, by kind of layer, a panel a case: the layer's error relative to its output in fp32.

    `cases`: (title, rows) each, rows {"layer": its name, "off": {way: error}} as in the study `fp8-errors`. Introduced in
    notebooks/13_fp8.
    """
    figure = figures.Plot(figsize=(9, 0.6 + 2.8 * len(cases)))
    for axes, (title, rows) in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases):
        for x, kind in enumerate(KINDS):
            found = [row["off"] for row in rows if kind_of(row["layer"]) == kind]
            for shift, (way, colour) in enumerate(WAYS.items()):
                off = [100 * one[way] for one in found if way in one]
                at = [x + 0.26 * (shift - 1) + 0.16 * (k / max(1, len(off) - 1) - 0.5) for k in range(len(off))]
                axes.plot(at, off, "o", color=colour, markersize=4, alpha=0.7)
        axes.set_xticks(range(len(KINDS)), KINDS.values(), fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_ylabel("error, % of the output", color=QUIET)
        figures.open_axes(axes, "y")
    handles = [Line2D([], [], color=WAYS[way], marker="o", linestyle="", label=CALLED[way]) for way in WAYS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(WAYS), frameon=False, fontsize=9)
    return figure


def sweep(title: str, metrics: Mapping, fewest: Mapping[str, int], fewest_of_convolution: int):
    """A mark a layer and size of the study `fp8-shapes`: how many times as fast as bf16 it is, by its size.

    Linear layers with the kernel that rounds for them, by the scales the engine has for each, see ROUNDED; a first half also with
    GEGLU in the same kernel. What attention writes for an output, and convolutions, are without what rounds. `fewest`, by a linear
    layer's scales, "row" and "tensor", and `fewest_of_convolution`: the multiplications from which on the engine takes one.
    Introduced in notebooks/13_fp8.
    """
    figure = figures.Plot(figsize=(9, 4.2))
    linear, convolved = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = metrics["shapes"]
    for (layer, marker), colour in zip(SWEPT.items(), SERIES):
        found = [row for row in rows if row["layer"] == layer]
        gains = [_gained(row, ROUNDED[layer]) for row in found]
        linear.plot([multiplications(row) for row in found], gains, marker, color=colour, label=layer)
    pairs = gated(rows)
    linear.plot([multiplications(wide) for wide, _, _ in pairs], [bf16 / fp8 for _, bf16, fp8 in pairs], "D", color=SERIES[2],
                markerfacecolor="none", label="feed-forward 1, gated in it")  # fmt: skip
    for (model, marker), colour in zip(CONVOLVED.items(), SERIES):
        found = [row for row in metrics["convolutions"] if row["model"] == model]
        gains = [row["seconds"]["bf16"] / row["seconds"]["e4m3"] for row in found]
        convolved.plot([multiplications(row) for row in found], gains, marker, color=colour, label=f"{model}'s convolutions")
    linear.axvline(fewest["tensor"], color=QUIET, linewidth=1, linestyle=":", label="taken from here on, with one scale")
    for axes, limit, said in ((linear, fewest["row"], ", with a scale a row"), (convolved, fewest_of_convolution, "")):
        axes.axhline(1, color=INK, linewidth=1)
        axes.axvline(limit, color=QUIET, linewidth=1, linestyle="--", label=f"taken from here on{said}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        figures.open_axes(axes)
        axes.legend(frameon=False, fontsize=8, ncols=2 if axes is linear else 1, loc="lower right")
    linear.set_title(title, fontsize=10, color=INK, loc="left")
    linear.set_ylabel("times as fast as bf16", color=QUIET)
    linear.set_xlabel("multiplications: rows x inputs x outputs", color=QUIET)
    convolved.set_xlabel("positions x 9 x inputs x outputs", color=QUIET)
    return figure


def _gained(row, way):
    """How many times as fast as bf16; an output is rounded by the attention before it, whose time the sweep does not have."""
    return whole(row, "bf16") / (whole(row, way) if row["before"] else row["seconds"][way])


def gated(rows: Sequence[Mapping]) -> list[tuple[Mapping, float, float]]:
    """[(row, seconds in bf16, seconds in fp8)] of each feed-forward's first half in the study `fp8-shapes`, GEGLU included.

    In bf16 GEGLU is a kernel of its own, the one before a second half, or in the product's, whichever is faster; in fp8 it is in
    the product's.
    """
    second = {(row["rows"], row["outputs"]): row["seconds"] for row in rows if row["layer"] == "feed-forward 2"}
    found = []
    for row in rows:
        if row["layer"] == "feed-forward 1" and (after := second.get((row["rows"], row["inputs"]))):
            seconds = row["seconds"]
            fp8 = seconds["before_row"] + seconds["gated_row"]
            bf16 = seconds["before_bf16"] + min(seconds["bf16"] + after["before_bf16"], seconds["gated_bf16"])
            found.append((row, bf16, fp8))
    return found
