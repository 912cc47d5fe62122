"""The two figures of a path study in a result file, and how to tell when they are stale."""

import hashlib
import io
import textwrap
from pathlib import Path

from PIL import Image

from sdopt import figures, results

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


def path_figure(result_path, pictures, target):
    """Draw a path study into the PNG `target`: a bar a step, by stage, and the picture each step drew.

    `pictures` is the folder of the images "1-baseline_fp32.png" and so on. Raises UserError for a result file that is
    none, or a `target` that cannot be written. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows = result["rows"]
    images = _pictures(result, pictures)
    figure = figures.Plot(figsize=(12, 1.5 + 0.42 * len(rows) + 2.2))
    bars, strip = figure.subfigures(2, 1, height_ratios=[0.9 + 0.42 * len(rows), 2.1])
    figures.draw_ladder(bars.subplots(), rows)
    bars.suptitle(
        f"Prompt to picture, step by step: {figures.described(result)}",
        fontsize=12,
        color=figures.INK,
        x=0.01,
        ha="left",
    )
    for axes, row in zip(strip.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        _picture(axes, images.get(row["id"]))
        axes.set_title(row["id"], fontsize=8.5, color=figures.INK)
        axes.set_xlabel(_caption(row), fontsize=7.5, color=figures.QUIET)
    _save(figure, target, digest(result_path, pictures))


def before_and_after(result_path, pictures, target):
    """Draw the first and the last picture of a path study side by side, each with its latency, into the PNG `target`."""
    result = results.read(result_path)
    images = _pictures(result, pictures)
    ends = figures.ends_of(result)
    figure = figures.Plot(figsize=(7, 4.3))
    both = figure.subplots(1, 2)
    for axes, row, title in zip(
        both, ends, ("the baseline", f"after {len(result['rows']) - 1} more steps"), strict=True
    ):
        _picture(axes, images.get(row["id"]))
        axes.set_title(f"{title}: {figures.seconds(row['latency_s']['median'])}", fontsize=13, color=figures.INK)
    figure.supxlabel(
        "\n".join(textwrap.wrap(f"“{result['settings']['prompt']}”", 80)), fontsize=10, color=figures.QUIET
    )
    _save(figure, target, digest(result_path, pictures))


def _caption(row):
    quality = row.get("quality")
    if row["status"] != "ok" or not quality:
        return "" if row["status"] == "ok" else "failed"
    lines = []
    for fact in ("objects", "relations"):
        if quality.get(fact) and quality[fact]["n"]:
            lines.append(f"{fact} {figures.count(quality[fact])}")
    if quality["against_baseline"]:
        lines.append(figures.decibels(quality["against_baseline"]))
    return "\n".join(lines)


def _picture(axes, file):
    figures.bare(axes)
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
