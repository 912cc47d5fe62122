"""Every plot, from rows of result files and the pictures that belong to them, and from nothing else."""

import hashlib
import io
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from sdopt import results

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
STAGES = {"text_encoder": "#009E73", "unet": "#0072B2", "scheduler": "#F0E442", "vae": "#E69F00", "rest": "#BBBBBB"}
NAMES = {"text_encoder": "text encoder", "unet": "UNet", "scheduler": "scheduler", "vae": "VAE decode", "rest": "rest"}
INK, QUIET = "#222222", "#666666"
SOURCE = "sdopt-source"


class Plot(Figure):
    """A figure that shows itself at the end of a notebook cell, and needs no display and no pyplot."""

    def __init__(self, **more):
        super().__init__(**{"layout": "constrained", "facecolor": "white"} | more)

    def _repr_png_(self):
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=80)
        return file.getvalue()


def digest(result_path, pictures):
    """The SHA-256 of a result file and its pictures: what a figure made from them carries, to tell when it is stale."""
    seen = hashlib.sha256(Path(result_path).read_bytes())
    for picture in _pictures(results.read(result_path), pictures).values():
        seen.update(picture.read_bytes())
    return seen.hexdigest()


def source(figure_path):
    """The digest a figure carries, None when it has none or is not there."""
    try:
        with Image.open(figure_path) as figure:
            return figure.info.get(SOURCE)
    except OSError:
        return None


def seconds(value):
    """A time in seconds for people: "3.21 s", "0.184 s"."""
    return f"{value:.2f} s" if value >= 1 else f"{value:.3f} s"


def described(result):
    """One line on what a path result measured and where, naming random weights as such."""
    s, e = result["settings"], result["environment"]
    where = e["gpu"] or e["cpu"]
    weights = ", random weights (times are real, pictures are noise)" if s["weights"] == "random" else ""
    return f"{s['model']}{weights}, {s['width']}x{s['height']}, {s['steps']} steps, batch {s['batch']}, {where}"


def path_figure(result_path, pictures, target):
    """Draw a path study into the PNG `target`: a bar a step, by stage, and the picture each step drew.

    `pictures` is the folder of the images "1-baseline_fp32.png" and so on. Raises UserError for a result file that is
    none, or a `target` that cannot be written. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows = result["rows"]
    images = _pictures(result, pictures)
    figure = Plot(figsize=(12, 1.5 + 0.42 * len(rows) + 2.2))
    bars, strip = figure.subfigures(2, 1, height_ratios=[0.9 + 0.42 * len(rows), 2.1])
    _ladder(bars.subplots(), rows)
    bars.suptitle(f"Prompt to picture, step by step: {described(result)}", fontsize=12, color=INK, x=0.01, ha="left")
    for axes, row in zip(strip.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        _picture(axes, images.get(row["id"]))
        axes.set_title(row["id"], fontsize=8.5, color=INK)
        axes.set_xlabel(_caption(row), fontsize=7.5, color=QUIET)
    _save(figure, target, digest(result_path, pictures))


def before_and_after(result_path, pictures, target):
    """Draw the first and the last picture of a path study side by side, each with its latency, into the PNG `target`."""
    result = results.read(result_path)
    images = _pictures(result, pictures)
    ends = ends_of(result)
    figure = Plot(figsize=(7, 4.3))
    both = figure.subplots(1, 2)
    for axes, row, title in zip(
        both, ends, ("the baseline", f"after {len(result['rows']) - 1} more steps"), strict=True
    ):
        _picture(axes, images.get(row["id"]))
        axes.set_title(f"{title}: {seconds(row['latency_s']['median'])}", fontsize=13, color=INK)
    figure.supxlabel("\n".join(textwrap.wrap(f"“{result['settings']['prompt']}”", 80)), fontsize=10, color=QUIET)
    _save(figure, target, digest(result_path, pictures))


def ladder(rows, recorded=()):
    """A bar a row, by stage, with median, p20 to p80 and the speed-up over the baseline; for a notebook.

    `rows` were measured here, `recorded` are (machine, row) of other machines' result files: hatched, and labelled so.
    Introduced in notebooks/01_baseline_fp32.
    """
    figure = Plot(figsize=(9, 1.3 + 0.42 * (len(rows) + len(recorded))))
    _ladder(figure.subplots(), list(rows), list(recorded))
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
    _rows_down(axes, [row["id"] for row in rows])
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
        _bare(axes[0][k]).imshow(picture, interpolation="lanczos")
        axes[0][k].set_title(title, fontsize=10, color=INK)
        if reference is not None:
            off = np.abs(np.asarray(picture, np.int16) - np.asarray(pictures[reference], np.int16))
            _bare(axes[1][k]).imshow(np.clip(gain * off, 0, 255).astype(np.uint8))
            axes[1][k].set_xlabel(
                "the reference" if k == reference else f"difference, {gain}x", fontsize=9, color=QUIET
            )
    return figure


def scatter(points, x, y):
    """Quality against latency: `points` are {"label", "x", "y", "low", "high"}, the last two may be left out.

    `x` and `y` name the axes. Introduced in notebooks/08_dpm_20.
    """
    figure = Plot(figsize=(8, 4.6))
    axes = figure.subplots()
    for point in points:
        spread = [[point["y"] - point["low"]], [point["high"] - point["y"]]] if "low" in point else None
        axes.errorbar(point["x"], point["y"], yerr=spread, fmt="o", color=STAGES["unet"], capsize=3, linewidth=1)
        axes.annotate(point["label"], (point["x"], point["y"]), xytext=(6, 5), textcoords="offset points", color=INK)
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ends_of(result):
    """The first and the last row of a path study that were measured."""
    measured = [row for row in result["rows"] if row["status"] == "ok"]
    return measured[0], measured[-1]


def baseline(rows):
    """The row all others are compared with, None where it was not measured."""
    return next((row for row in rows if row["id"] == "baseline_fp32" and row["status"] == "ok"), None)


def _ladder(axes, rows, recorded=()):
    base, shown = baseline(rows), [*rows, *(row for _, row in recorded)]
    longest = max((row["latency_s"]["p80"] for row in shown if row["status"] == "ok"), default=1.0)
    for y, row in enumerate(shown):
        elsewhere = y >= len(rows)
        if row["status"] != "ok":
            axes.text(longest * 0.01, y, row["status"], va="center", fontsize=9, color=QUIET, style="italic")
            continue
        latency, left = row["latency_s"], 0.0
        for stage, width in _stages_s(row).items():
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
    _rows_down(axes, [row["id"] for row in rows] + [f"{row['id']}\n({machine})" for machine, row in recorded])
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds; bars: the stages of one call; dot: median of the timed calls, p20 to p80", color=QUIET)
    handles = [Patch(color=colour, label=NAMES[stage]) for stage, colour in STAGES.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _rows_down(axes, names):
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _stages_s(row):
    stages = {stage: row["stages_ms"][stage] / 1e3 for stage in STAGES if stage != "rest"}
    return stages | {"rest": max(0.0, row["latency_s"]["median"] - sum(stages.values()))}


def _caption(row):
    quality = row.get("quality")
    if row["status"] != "ok" or not quality:
        return "" if row["status"] == "ok" else "failed"
    lines = []
    for fact in ("objects", "relations"):
        if quality.get(fact) and quality[fact]["n"]:
            lines.append(f"{fact} {count(quality[fact])}")
    if quality["against_baseline"]:
        lines.append(decibels(quality["against_baseline"]))
    return "\n".join(lines)


def count(share):
    """A share for people: "8/10"."""
    return f"{round(share['value'] * share['n'])}/{share['n']}"


def decibels(drift):
    """A drift for people: "34.2 dB", or "identical"."""
    return "identical" if drift["exact"] else f"{drift['psnr_db']:.1f} dB"


def _bare(axes):
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _picture(axes, file):
    _bare(axes)
    if file is not None:
        with Image.open(file) as image:
            axes.imshow(image.convert("RGB"), interpolation="lanczos")


def _pictures(result, folder):
    """The images of the rows that were measured, by row id, in the order of the rows."""
    measured = [row["id"] for row in result["rows"] if row["status"] == "ok"]
    files = {i: sorted(Path(folder).glob(f"[0-9]*-{i}.png")) for i in measured}
    return {i: found[0] for i, found in files.items() if found}


def _save(figure, target, source_digest):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={SOURCE: source_digest, "Software": None})
    results.write_whole(target, file.getvalue())
