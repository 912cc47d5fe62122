"""The figures of a path study in a result file: the ladder and its two ends."""

import textwrap
from pathlib import Path

from PIL import Image

from sdopt import figures, results
from sdopt.figures import INK, QUIET
from sdopt.path import NUMBERS

PICTURED = (*NUMBERS, "recommended")  # the other rows beside the path draw what the baseline draws


def sources(result_path, pictures):
    """The files that the figures of a path study are drawn from: its result and its pictures."""
    return [Path(result_path), *_pictures(results.read(result_path), pictures).values()]


def path_figure(result_path, pictures, target):
    """Draw a path study into the PNG `target`: a bar a step, by stage, and the picture each step drew, if any.

    `pictures` is the folder of the images "1-baseline_fp32.png" and so on; what random weights draw has none. Raises
    UserError for a result file that is none, or a `target` that cannot be written. Introduced in
    notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows, images = result["rows"], _pictures(result, pictures)
    height = 1.7 + 0.42 * len(rows)
    figure = figures.Plot(figsize=(12, height + (2.1 if images else 0)))
    ladder = figure.subfigures(2, 1, height_ratios=[height, 2.1])[0] if images else figure
    axes = ladder.subplots()
    figures.draw_ladder(axes, rows)
    set_apart(axes, rows)
    figures.title(ladder, "Prompt to picture, step by step", result)
    if images:
        _strip(figure.subfigs[1], [row for row in rows if row["id"] in PICTURED], images)
    figures.save(figure, target, sources(result_path, pictures))


def before_and_after(result_path, pictures, target):
    """Draw the pictures of the path's two ends side by side, each with its latency, into the PNG `target`."""
    result = results.read(result_path)
    images = _pictures(result, pictures)
    ends = figures.ends_of(result)
    figure = figures.Plot(figsize=(7, 4.3))
    titles = ("the baseline", f"after {NUMBERS[ends[1]['id']] - 1} more steps")
    for axes, row, title in zip(figure.subplots(1, 2), ends, titles, strict=True):
        _picture(axes, images.get(row["id"]))
        axes.set_title(f"{title}: {figures.seconds(row['latency_s']['median'])}", fontsize=13, color=INK)
    figure.supxlabel("\n".join(textwrap.wrap(f"“{result['settings']['prompt']}”", 80)), fontsize=10, color=QUIET)
    figures.save(figure, target, sources(result_path, pictures))


def set_apart(axes, rows):
    """A line between the nine steps and the rows beside them."""
    taught = sum(row["id"] in NUMBERS for row in rows)
    if 0 < taught < len(rows):
        axes.axhline(taught - 0.5, color=QUIET, linewidth=0.8, linestyle=":")


def _strip(figure, rows, images):
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        _picture(axes, images.get(row["id"]))
        axes.set_title(row["id"], fontsize=8.5, color=INK)
        axes.set_xlabel(_caption(row), fontsize=7.5, color=QUIET)


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
    measured = [row["id"] for row in result["rows"] if row["status"] == "ok" and row["id"] in PICTURED]
    files = {i: sorted(Path(folder).glob(f"[0-9]*-{i}.png")) for i in measured}
    return {i: found[0] for i, found in files.items() if found}
