"""Where time goes: the stages of each row's picture, the kernels of its UNet calls, who waits for whom at a few launches."""

from matplotlib.patches import Patch

from sdopt import figures, results
from sdopt.figures import INK, NAMES, QUIET, STAGES
from sdopt.pathfigures import set_apart, sources

KERNELS = {"matrix product": "#0072B2", "convolution": "#56B4E9", "attention": "#E69F00", "other": "#BBBBBB"}
SHOWN = {"matrix product": "matrix products", "convolution": "convolutions"}
DARK = ("#009E73", "#0072B2")  # white is read on these, ink on the others
LANES = {"CPU": ("launches", "#E69F00"), "GPU": ("runs", "#0072B2")}
SEEN = 4.5  # the least share of a bar, in percent, that has room for its number


def stages_figure(result_path, pictures, target):
    """Draw where each row of a path study spends its time into the PNG `target`: shares by stage, and milliseconds.

    `pictures`, the folder of the study's images, is only what marks the figure's source. Raises UserError for a result
    file that is none, or a `target` that cannot be written. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    lines = []
    for row in result["rows"]:
        ok = row["status"] == "ok"
        parts, median = (figures.stages_s(row), row["latency_s"]["median"]) if ok else (row["status"], None)
        lines.append((row["id"], parts, median))
    figure, shares = _drawn(lines, {stage: (NAMES[stage], colour) for stage, colour in STAGES.items()}, "median")
    set_apart(shares, result["rows"])
    shares.set_xlabel("share of the time of one call, %", color=QUIET)
    figure.axes[1].set_xlabel("milliseconds of one call; median of the timed calls", color=QUIET)
    figures.title(figure, "Where the time of a picture goes", result)
    figures.save(figure, target, sources(result_path, pictures))


def kernels_figure(result_path, pictures, target):
    """Draw what the GPU does in a UNet call of each row of a study into the PNG `target`, by kind of kernel.

    A row whose UNet sees batches of two sizes (guided and not) has a line for each. `pictures` as in `stages_figure`.
    Raises UserError as it does. Introduced in notebooks/10_the_whole_path.
    """
    result = results.read(result_path)
    lines = []
    for row in result["rows"]:
        calls = row.get("unet_kernels", ()) if row["status"] == "ok" else ()
        for call in calls:
            batch = f" ({call['samples']} at once)" if len(calls) > 1 else ""
            parts = {kind: call["ms"][kind] / 1e3 for kind in KERNELS}
            lines.append((row["id"] + batch, parts, sum(parts.values())))
    kinds = {kind: (SHOWN.get(kind, kind), colour) for kind, colour in KERNELS.items()}
    figure, shares = _drawn(lines, kinds, "sum")
    shares.set_xlabel("share of the kernels' time, %", color=QUIET)
    figure.axes[1].set_xlabel(
        "milliseconds of the GPU in one UNet call\nother: norms, pointwise work, copies", color=QUIET
    )
    figures.title(figure, "What the GPU does in a UNet call", result)
    figures.save(figure, target, sources(result_path, pictures))


def queue(launches, kernels):
    """When a GPU runs the kernels that a CPU launches one after the other: [(start, end)], in the unit of the two lists.

    A kernel starts when it has been launched and the one before it has ended. Introduced in notebooks/12_cuda_graphs.
    """
    spans, launched, free = [], 0.0, 0.0
    for launch, kernel in zip(launches, kernels, strict=True):
        launched += launch
        start = max(launched, free)
        free = start + kernel
        spans.append((start, free))
    return spans


def lanes(cases):
    """Who works when, for a notebook: `cases` {name: (seconds of each launch, seconds of each kernel)}, by `queue`.

    A lane for the CPU and one for the GPU each, and what share of the time the GPU is busy. Introduced in
    notebooks/12_cuda_graphs.
    """
    figure = figures.Plot(figsize=(9, 1.2 + 0.7 * len(cases)))
    axes, names = figure.subplots(), []
    for name, (launches, kernels) in cases.items():
        ends, launched = queue(launches, kernels), 0.0
        for launch in launches:
            _span(axes, len(names), launched, launched + launch, LANES["CPU"][1])
            launched += launch
        for start, end in ends:
            _span(axes, len(names) + 1, start, end, LANES["GPU"][1])
        last = ends[-1][1]
        words = f" {1e6 * last:.1f} us, the GPU busy {sum(kernels) / last:.0%} of them"
        axes.text(1e6 * last, len(names) + 1, words, va="center", fontsize=9, color=INK)
        names += [f"{name}: {lane}" for lane in LANES]
    figures.rows_down(axes, names)
    axes.set_xlim(0, 1.45e6 * max(queue(*case)[-1][1] for case in cases.values()))
    axes.set_xlabel("microseconds", color=QUIET)
    handles = [Patch(color=colour, label=f"the {lane} {does}") for lane, (does, colour) in LANES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _span(axes, y, start, end, colour):
    if end > start:  # a graph launches its second kernel in no time
        axes.barh(y, 1e6 * (end - start), left=1e6 * start, height=0.62, color=colour, edgecolor="white", linewidth=0.8)


def _drawn(lines, parts, last):
    """A figure of `lines` (name, {part: seconds} or why there is none, seconds of the last column), and its left half.

    `parts` is {part: (name, colour)}, in the order they are drawn.
    """
    figure = figures.Plot(figsize=(12, 1.9 + 0.42 * len(lines)))
    shares, table = figure.subplots(1, 2)
    for y, (_, seconds, end) in enumerate(lines):
        if isinstance(seconds, str):
            shares.text(0.5, y, seconds, va="center", fontsize=9, color=QUIET, style="italic")
            continue
        _shares(shares, y, seconds, parts)
        for k, value in enumerate([*(seconds[part] for part in parts), end]):
            ms = 1e3 * value
            words = f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"
            table.text(k, y, words, ha="right", va="center", fontsize=9, color=INK)
    columns = [*(name for name, _ in parts.values()), last]
    figures.bare(table).set_xlim(-0.9, len(columns) - 1)
    for k, name in enumerate(columns):
        table.text(k, -0.55, name, ha="right", va="bottom", fontsize=9, color=QUIET)
    shares.set_xlim(0, 100)
    figures.rows_down(shares, [name for name, *_ in lines])
    table.set_ylim(shares.get_ylim())
    handles = [Patch(color=colour, label=name) for name, colour in parts.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure, shares


def _shares(axes, y, seconds, parts):
    whole, left = sum(seconds.values()), 0.0
    for part, (_, colour) in parts.items():
        share = 100 * seconds[part] / whole
        axes.barh(y, share, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.5)
        if share > SEEN:
            ink = "white" if colour in DARK else INK
            axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=9, color=ink)
        left += share
