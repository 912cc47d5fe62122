"""Every plot, from rows of result files and the pictures that belong to them, and from nothing else."""

import hashlib
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from sdopt import results
from sdopt.errors import UserError
from sdopt.guidance import guided_steps
from sdopt.models import model
from sdopt.path import NUMBERS

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
STAGES = {"text_encoder": "#009E73", "unet": "#0072B2", "scheduler": "#F0E442", "vae": "#E69F00", "rest": "#BBBBBB"}
NAMES = {"text_encoder": "text encoder", "unet": "UNet", "scheduler": "scheduler", "vae": "VAE decode", "rest": "rest"}
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, QUIET = "#222222", "#666666"
SOURCE = "sdopt-source"
DRAWN = 5  # counts the changes in how figures are drawn: a new number makes all of them stale
FEW = 5000  # colours: what is drawn of lines and bars has fewer, and pictures of things more


class Plot(Figure):
    """A figure that shows itself at the end of a notebook cell, and needs no display and no pyplot."""

    def __init__(self, **more):
        super().__init__(**{"layout": "constrained", "facecolor": "white"} | more)

    def _repr_png_(self):
        return png(self, dpi=80)


def png(figure, dpi, text=None):
    """`figure` as the bytes of a PNG, see `results.png`: opaque, and with FEW colours as a palette, a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB")
    return results.png(picture.quantize(dither=Image.Dither.NONE) if picture.getcolors(FEW) else picture, dpi, text)


def digest(files):
    """The SHA-256 of what a figure is drawn from: the figure carries it, to tell when it is stale."""
    seen = hashlib.sha256(f"drawn {DRAWN}".encode())
    for file in files:
        seen.update(Path(file).read_bytes())
    return seen.hexdigest()


def source(figure_path):
    """The digest a figure carries, None when it has none or is not there."""
    try:
        with Image.open(figure_path) as figure:
            return figure.info.get(SOURCE)
    except OSError:
        return None


def save(figure, target, files):
    """Write `figure`, drawn from `files`, to the PNG `target`. Raises UserError when it cannot be written."""
    results.write_whole(target, png(figure, 110, {SOURCE: digest(files)}))


def title(figure, words, result):
    """Above a figure: what it shows, and what was measured where."""
    figure.suptitle(f"{words}\n{described(result)}", fontsize=12, color=INK, x=0.01, ha="left")


def seconds(value):
    """A time in seconds for people: "0.184 s", "3.21 s", "212 s"."""
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 0}f} s"


def described(result):
    """One line on what a path result measured and where, naming random weights as such."""
    s, e = result["settings"], result["environment"]
    where, name = e["gpu"] or e["cpu"], model(s["model"]).title
    weights = ", random weights (times are real, pictures are noise)" if s["weights"] == "random" else ""
    batches = {row["settings"].get("batch", s["batch"]) for row in result["rows"]} or {s["batch"]}
    batch = " to ".join(dict.fromkeys(map(str, (min(batches), max(batches)))))
    return f"{name}{weights}, {s['width']}x{s['height']}, {s['steps']} steps, batch {batch}, {where}"


def ladder(rows, recorded=()):
    """A bar a row, by stage, with median, p20 to p80 and the speed-up over the baseline; for a notebook.

    `rows` were measured here, `recorded` are (machine, row) of other machines' result files: hatched, and labelled so.
    Introduced in notebooks/01_baseline_fp32.
    """
    figure = Plot(figsize=(9, 1.3 + 0.42 * (len(rows) + len(recorded))))
    draw_ladder(figure.subplots(), list(rows), list(recorded))
    return figure


def memory(rows):
    """A bar a row: peak memory in MiB; for a notebook. Introduced in notebooks/02_bf16."""
    figure = Plot(figsize=(9, 0.8 + 0.36 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        mib = row["peak_memory_bytes"] / 2**20
        axes.barh(y, mib, height=0.62, color=STAGES["unet"])
        axes.text(mib, y, f" {mib:,.0f} MiB", va="center", color=INK)
    axes.set_xlim(0, 1.2 * max(row["peak_memory_bytes"] for row in rows) / 2**20)
    rows_down(axes, [row["id"] for row in rows])
    axes.set_xlabel("peak memory, MiB", color=QUIET)
    return figure


def grid(pictures, titles, reference=None, gain=8):
    """PIL images in a line, under each its difference from image number `reference`, `gain` times; for a notebook.

    Without a reference the differences are left out. Introduced in notebooks/02_bf16.
    """
    lines = 1 if reference is None else 2
    figure = Plot(figsize=(2.6 * len(pictures), 2.9 * lines))
    axes = figure.subplots(lines, len(pictures), squeeze=False)
    for k, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        bare(axes[0][k]).imshow(picture, interpolation="lanczos")
        axes[0][k].set_title(title, fontsize=10, color=INK)
        if reference is not None:
            off = np.abs(np.asarray(picture, np.int16) - np.asarray(pictures[reference], np.int16))
            bare(axes[1][k]).imshow(np.clip(gain * off, 0, 255).astype(np.uint8))
            axes[1][k].set_xlabel(
                "the reference" if k == reference else f"difference, {gain}x", fontsize=9, color=QUIET
            )
    return figure


def scatter(points, x, y):
    """Points with labels, for a notebook: quality against latency, say. Those of a "series" share colour and line.

    `points` are {"label", "x", "y", "series", "low", "high"}; the last three may be left out. `x` and `y` name the
    axes. Introduced in notebooks/08_dpm_20.
    """
    figure = Plot(figsize=(8, 4.6))
    axes = figure.subplots()
    for colour, series in zip(SERIES, dict.fromkeys(point.get("series") for point in points)):
        own = [point for point in points if point.get("series") == series]
        xs, ys = ([point[key] for point in own] for key in "xy")
        spread = [[max(0, p["y"] - p.get("low", p["y"])), max(0, p.get("high", p["y"]) - p["y"])] for p in own]
        join = "-" if series else "none"
        axes.errorbar(
            xs,
            ys,
            yerr=np.transpose(spread),
            fmt="o",
            color=colour,
            capsize=3,
            linestyle=join,
            linewidth=1,
            label=series,
        )
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    left, right = min(point["x"] for point in points), max(point["x"] for point in points)
    room = 0.1 * (right - min(left, 0) or 1)
    axes.set_xlim(min(left, 0) - 0.2 * room, right + room)
    axes.margins(y=0.15)
    open_axes(axes)
    if any(point.get("series") for point in points):
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    label(axes, points)
    return figure


def label(axes, points):
    """Write each point's label beside it, at the first of eight places where it covers no other label and no point."""
    axes.figure.draw_without_rendering()  # so that sizes are known
    pixels = axes.transData.transform([(point["x"], point["y"]) for point in points])
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in pixels]
    taken += [text.get_window_extent() for text in axes.texts]
    for point in points:
        for dx, dy in ((6, 5), (-6, 5), (6, -5), (-6, -5), (0, 8), (0, -8), (14, 14), (14, -14)):
            text = axes.annotate(
                point["label"], (point["x"], point["y"]), xytext=(dx, dy), textcoords="offset points", color=INK,
                fontsize=9, ha=("right", "center", "left")[np.sign(dx) + 1], va="bottom" if dy > 0 else "top",
            )  # fmt: skip
            box = text.get_window_extent()
            if not point["label"] or (
                box.count_overlaps(taken) == 0 and axes.bbox.x1 >= box.x1 and box.x0 >= axes.bbox.x0
            ):
                taken.append(box)
                break
            text.set_visible(False)
        else:
            text.set_visible(True)


def ends_of(result):
    """The baseline and the last of the nine steps that was measured. Raises UserError where there is no baseline."""
    base = baseline(result["rows"])
    if base is None:
        raise UserError(f"{result['study']} holds no baseline to compare with: measure its row baseline_fp32")
    return base, [row for row in result["rows"] if row["status"] == "ok" and row["id"] in NUMBERS][-1]


def baseline(rows):
    """The row all others are compared with, None where it was not measured."""
    return next((row for row in rows if row["id"] == "baseline_fp32" and row["status"] == "ok"), None)


def draw_ladder(axes, rows, recorded=()):
    base, shown = baseline(rows), [*rows, *(row for _, row in recorded)]
    longest = max((row["latency_s"]["p80"] for row in shown if row["status"] == "ok"), default=1.0)
    for y, row in enumerate(shown):
        elsewhere = y >= len(rows)
        if row["status"] != "ok":
            axes.text(longest * 0.01, y, row["status"], va="center", fontsize=9, color=QUIET, style="italic")
            continue
        latency, left = row["latency_s"], 0.0
        for stage, width in stages_s(row).items():
            axes.barh(
                y,
                width,
                left=left,
                height=0.62,
                color=STAGES[stage],
                edgecolor="white",
                linewidth=0.5,
                hatch="//" if elsewhere else None,
            )
            left += width
        middle = latency["median"]
        spread = [[middle - latency["p20"]], [latency["p80"] - middle]]
        axes.errorbar(middle, y, xerr=spread, fmt="o", color=INK, markersize=4, capsize=3, linewidth=1.2)
        gain = f"   {base['latency_s']['median'] / middle:.2f}x" if base and not elsewhere else ""
        axes.text(max(left, latency["p80"]) + longest * 0.015, y, seconds(middle) + gain, va="center", color=INK)
    rows_down(axes, [row["id"] for row in rows] + [f"{row['id']}\n({machine})" for machine, row in recorded])
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds; bars: the stages of one call; dot: median of the timed calls, p20 to p80", color=QUIET)
    handles = [Patch(color=colour, label=NAMES[stage]) for stage, colour in STAGES.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def rows_down(axes, names):
    """Name the rows of `axes`, the first on top, and clear away the frame."""
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def stages_s(row):
    """Seconds a row spent by stage, {"unet": 1.2, ...}; what the stages leave of its median is the "rest"."""
    stages = {stage: row["stages_ms"][stage] / 1e3 for stage in STAGES if stage != "rest"}
    return stages | {"rest": max(0.0, row["latency_s"]["median"] - sum(stages.values()))}


def profiled_calls(row):
    """The profiled calls of a row, the larger batch first, each with how many calls of a picture are like it."""
    profiled = sorted(row["unet_kernels"], key=lambda call: -call["samples"])
    calls = row["stages_ms"]["unet_calls"]
    guided = guided_steps(row["settings"].get("cutoff", 1.0), calls) if len(profiled) > 1 else calls
    return list(zip((guided, calls - guided), profiled, strict=False))


def kernels_ms(row):
    """Milliseconds that the GPU's kernels take in all calls of the row's UNet."""
    return sum(n * sum(call["ms"].values()) for n, call in profiled_calls(row))


def count(share):
    """A share for people: "8/10"."""
    return f"{round(share['value'] * share['n'])}/{share['n']}"


def decibels(drift):
    """A drift for people: "34.2 dB", or "identical"."""
    return "identical" if drift["exact"] else f"{drift['psnr_db']:.1f} dB"


def logarithmic(axes):
    """Both scales logarithmic, with plain numbers, on a quiet grid."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(NullFormatter())
    open_axes(axes)
    return axes


def bare(axes):
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def open_axes(axes, grid="both"):
    """Take away the frame's top and right, and put a faint grid behind: "both", or "x" or "y" alone."""
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
