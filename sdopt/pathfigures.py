"""The figures of a path study in a result file: the ladder, where its time goes, and its two ends."""

import textwrap
from pathlib import Path

from matplotlib.patches import Patch
from PIL import Image

from sdopt import figures, results
from sdopt.figures import INK, NAMES, QUIET, STAGES
from sdopt.path import NUMBERS

PICTURED = (*NUMBERS, "recommended")  # the other rows beside the path draw what the baseline draws
SEEN = 0.045  # the least share of a bar that has room for its number


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
    _set_apart(axes, rows)
    figures.title(ladder, "Prompt to picture, step by step", result)
    if images:
        _strip(figure.subfigs[1], [row for row in rows if row["id"] in PICTURED], images)
    figures.save(figure, target, sources(result_path, pictures))


def stages_figure(result_path, pictures, target):
    """Draw where each row of a path study spends its time into the PNG `target`: shares by stage, and milliseconds.

    `pictures` is only what marks the figure's source. Raises UserError as `path_figure` does. Introduced in
    notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    rows = result["rows"]
    figure = figures.Plot(figsize=(12, 1.9 + 0.42 * len(rows)))
    shares, table = figure.subplots(1, 2)
    for y, row in enumerate(rows):
        if row["status"] == "ok":
            _shares(shares, y, row)
            _milliseconds(table, y, row)
        else:
            shares.text(0.5, y, row["status"], va="center", fontsize=9, color=QUIET, style="italic")
    columns = [*NAMES.values(), "median"]
    figures.bare(table).set_xlim(-0.9, len(columns) - 1)
    for k, name in enumerate(columns):
        table.text(k, -0.55, name, ha="right", va="bottom", fontsize=9, color=QUIET)
    shares.set_xlim(0, 100)
    figures.rows_down(shares, [row["id"] for row in rows])
    table.set_ylim(shares.get_ylim())
    _set_apart(shares, rows)
    shares.set_xlabel("share of the time of one call, %", color=QUIET)
    table.set_xlabel("milliseconds of one call; median of the timed calls", color=QUIET)
    handles = [Patch(color=colour, label=NAMES[stage]) for stage, colour in STAGES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figures.title(figure, "Where the time of a picture goes", result)
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


def _set_apart(axes, rows):
    """A line between the nine steps and the rows beside them."""
    taught = sum(row["id"] in NUMBERS for row in rows)
    if 0 < taught < len(rows):
        axes.axhline(taught - 0.5, color=QUIET, linewidth=0.8, linestyle=":")


def _shares(axes, y, row):
    stages, left = figures.stages_s(row), 0.0
    whole = sum(stages.values())
    for stage, seconds in stages.items():
        share = seconds / whole
        axes.barh(y, 100 * share, left=left, height=0.62, color=STAGES[stage], edgecolor="white", linewidth=0.5)
        if share > SEEN:
            ink = "white" if stage in ("unet", "text_encoder") else INK
            axes.text(left + 50 * share, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=ink)
        left += 100 * share


def _milliseconds(axes, y, row):
    stages = figures.stages_s(row)
    for k, seconds in enumerate([*stages.values(), row["latency_s"]["median"]]):
        ms = 1e3 * seconds
        axes.text(k, y, f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}", ha="right", va="center", fontsize=9, color=INK)


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
