"""Every plot, from result files and the pictures stored beside them, and from nothing else."""

import hashlib
import io
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image

from sdopt import results

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
STAGES = {"text_encoder": "#009E73", "unet": "#0072B2", "scheduler": "#F0E442", "vae": "#E69F00", "rest": "#BBBBBB"}
NAMES = {"text_encoder": "text encoder", "unet": "UNet", "scheduler": "scheduler", "vae": "VAE decode", "rest": "rest"}
INK, QUIET = "#222222", "#666666"
SOURCE = "sdopt-source"


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
    figure = plt.figure(figsize=(12, 1.5 + 0.42 * len(rows) + 2.2), layout="constrained", facecolor="white")
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
    figure, both = plt.subplots(1, 2, figsize=(7, 4.3), layout="constrained", facecolor="white")
    for axes, row, title in zip(
        both, ends, ("the baseline", f"after {len(result['rows']) - 1} more steps"), strict=True
    ):
        _picture(axes, images.get(row["id"]))
        axes.set_title(f"{title}: {seconds(row['latency_s']['median'])}", fontsize=13, color=INK)
    figure.supxlabel("\n".join(textwrap.wrap(f"“{result['settings']['prompt']}”", 80)), fontsize=10, color=QUIET)
    _save(figure, target, digest(result_path, pictures))


def ends_of(result):
    """The first and the last row of a path study that were measured."""
    measured = [row for row in result["rows"] if row["status"] == "ok"]
    return measured[0], measured[-1]


def baseline(rows):
    """The row all others are compared with, None where it was not measured."""
    return next((row for row in rows if row["id"] == "baseline_fp32" and row["status"] == "ok"), None)


def _ladder(axes, rows):
    base = baseline(rows)
    longest = max((row["latency_s"]["p80"] for row in rows if row["status"] == "ok"), default=1.0)
    for y, row in enumerate(rows):
        if row["status"] != "ok":
            axes.text(longest * 0.01, y, row["status"], va="center", fontsize=9, color=QUIET, style="italic")
            continue
        latency, left = row["latency_s"], 0.0
        for stage, width in _stages_s(row).items():
            axes.barh(y, width, left=left, height=0.62, color=STAGES[stage], edgecolor="white", linewidth=0.5)
            left += width
        middle = latency["median"]
        spread = [[middle - latency["p20"]], [latency["p80"] - middle]]
        axes.errorbar(middle, y, xerr=spread, fmt="o", color=INK, markersize=4, capsize=3, linewidth=1.2)
        gain = f"   {base['latency_s']['median'] / middle:.2f}x" if base else ""
        axes.text(max(left, latency["p80"]) + longest * 0.015, y, seconds(middle) + gain, va="center", color=INK)
    axes.set_yticks(range(len(rows)), [row["id"] for row in rows], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds; bars: the stages of one call; dot: median of the timed calls, p20 to p80", color=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [matplotlib.patches.Patch(color=colour, label=NAMES[stage]) for stage, colour in STAGES.items()]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)


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


def _picture(axes, file):
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
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
    plt.close(figure)
    results.write_whole(target, file.getvalue())
