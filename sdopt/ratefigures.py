"""The figure of a throughput study: pictures a second by batch, beside what the GPU's products would allow, and what that takes."""

from matplotlib.lines import Line2D

from sdopt import figures, ratetables, results
from sdopt.figures import INK, QUIET, SERIES
from sdopt.gridfigures import by_batch_axis
from sdopt.gridtables import GIB, batch_of

ENGINES = {"bf16": (SERIES[0], "o", "bfloat16"), "fp8": (SERIES[5], "^", "fp8")}  # colour, marker, the ceiling's name


def throughput_figure(result_path, target):
    """Draw a throughput study into the PNG `target`: pictures a second, a point a timed call, then memory, then clocks.

    The dashed lines are what the measured square products would draw a second, were a picture nothing but them.
    Raises UserError for a result file that is none, or a `target` that cannot be written. Introduced in notebooks/13_fp8.
    """
    result = results.read(result_path)
    rows = [(row["id"].partition("_")[0], batch_of(row, result), row) for row in result["rows"]]
    most = ratetables.ceilings(result["rows"])
    figure = figures.Plot(figsize=(12, 4.6))
    rate, memory, clock = figure.subplots(1, 3, width_ratios=(5, 4, 4))
    for name, (colour, marker, ceiling) in ENGINES.items():
        done = [(batch, row) for kind, batch, row in rows if kind == name and row["status"] == "ok"]
        line = {"color": colour, "linewidth": 1.2}
        for batch, row in done:
            seconds = row["latency_s"]["runs"]
            rate.plot([batch] * len(seconds), [batch / s for s in seconds], marker, color=colour, markersize=5, alpha=0.6)
        batches = [batch for batch, _ in done]
        rate.plot(batches, [row["rate"]["images_per_s"] for _, row in done], **line)
        if done and ceiling in most:
            rate.axhline(1e12 * most[ceiling] / done[0][1]["flops_a_picture"], color=colour, linewidth=1, linestyle="--")
        memory.plot(batches, [row["peak_memory_bytes"] / GIB for _, row in done], marker=marker, markersize=5, **line)
        clocks = {batch: mhz / 1000 for batch, row in done for mhz in _medians([row], "sm_clock_mhz")}
        clock.plot(list(clocks), list(clocks.values()), marker=marker, markersize=5, **line)
        for kind, batch, row in rows:
            if kind == name and row["status"] != "ok":
                rate.plot(batch, 0, "x", color=colour, markersize=8)
    powers = _medians([row for *_, row in rows], "power_w")
    drawn = f", at {min(powers):,.0f} to {max(powers):,.0f} W" if powers else ""
    titles = "images a second, every timed call", "peak memory, GiB", f"SM clock, GHz{drawn}"
    for axes, words in zip((rate, memory, clock), titles, strict=True):
        axes.set_title(words, fontsize=11, color=INK)
        by_batch_axis(axes, sorted({batch for _, batch, _ in rows}))
        axes.set_ylim(0, 1.06 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    handles = [
        *(Line2D([], [], color=c, marker=m, markersize=6, label=f"our engine in {n}") for n, (c, m, _) in ENGINES.items()),
        Line2D([], [], color=QUIET, linestyle="--", label="a picture's products at the rate of a large square one, in that format"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figures.title(figure, "More pictures at once, on our engine", result)
    figures.save(figure, target, [result_path])


def _medians(rows, sensor):
    """What a sensor said while rows were timed; of those whose GPU has none, and that failed, nothing."""
    return [row["gpu"][sensor]["median"] for row in rows if sensor in row.get("gpu", {})]
