"""When a first call has paid for itself: seconds since the pipeline was loaded, picture by picture, against eager bf16.

A way to run takes its `prepare_s` and its first call for the first picture, then its median for every other. Cold, the first
call compiles all; warm, another process finds what it compiled on disk. Loading the model is the same for all and left out.
"""

import math
from dataclasses import dataclass

from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from sdopt import figures, results
from sdopt.figures import INK, QUIET, SERIES

REFERENCE = "eager_bf16"
HEADER = ("way", "what", "first picture", "each later one", "paid back after", "between", "by then")
RULE = (
    "counted from a loaded pipeline; paid back: when a way has drawn as many pictures as eager_bf16 would have by then; "
    "between: if every later picture took the p20 of the one way and the p80 of the other, or the reverse; warm: another "
    "process finds on disk what was compiled"
)
COUNTED_IN = {
    "before_s": "seconds of an earlier process whose search was taken up, which are counted in",
    "shared_s": "seconds of several processes that searched side by side, added up as one would have taken, counted in",
}
MOST = 1_000_000  # pictures: nobody waits for more


@dataclass(frozen=True)
class Way:
    """A row of a peer study, begun cold or with a warm cache: seconds to the first picture, and of each later one."""

    id: str
    label: str
    warm: bool
    first_s: float
    latency: dict  # as in a result file

    @property
    def name(self):
        return self.id + (", warm" if self.warm else "")

    def after(self, pictures):
        """Seconds until that many pictures are drawn."""
        return self.first_s + (pictures - 1) * self.latency["median"]


def ways(result):
    """The `Way`s of a peer study's measured rows, in their order; a row that compiles has two, or one where it was found
    compiled.
    """
    found = []
    for row in result["rows"]:
        if row["status"] == "ok":
            calls = row.get("first_calls") or {"cold_s": row["first_call_s"], "warm_s": None}
            for warm, seconds in ((False, calls["cold_s"]), (True, calls["warm_s"])):
                if seconds:
                    first = row.get("prepare_s", 0.0) + seconds
                    found.append(Way(row["id"], row["label"], warm, first, row["latency_s"]))
    return found


def first_calls(rows):
    """What is to be said of the first calls of rows that compile, and of a new size's first picture, a sentence each."""
    return [*_compiled(rows), *_new_sizes(rows)]


def _new_sizes(rows):
    sizes = {}
    for row in rows:
        if new := row.get("other_size"):
            took = f"{row['id']} {figures.seconds(new['first_s'])}, then {figures.seconds(new['second_s'])}"
            sizes.setdefault((new["height"], new["width"]), []).append(took)
    return [f"a size not drawn before, {high}x{wide}, its first picture: {'; '.join(those)}" for (high, wide), those in sizes.items()]


def _compiled(rows):
    calls = {row["id"]: row["first_calls"] for row in rows if row.get("first_calls")}
    if not calls:
        return []
    found = [f"{i} {c['found']} of {c['found'] + c['compiled']}" for i, c in calls.items() if c["found"]]
    some = f"; graphs that other rows had left there already: {', '.join(found)}" if found else ""
    counted = {
        part: [f"{i} {figures.seconds(c[part])} of {figures.seconds(c['cold_s'])}" for i, c in calls.items() if c.get(part)]
        for part in COUNTED_IN
    }
    beside = [i for i, c in calls.items() if c.get("beside")]
    return [
        "first call, of rows that compile: what the row needs is compiled and kept on disk; warm: the first call of "
        f"another process, which finds it there{some}",
        *(f"first call, {COUNTED_IN[part]}: {', '.join(those)}" for part, those in counted.items() if those),
        *(f"first call, compiled beside another row's: {', '.join(those)}" for those in [beside] if those),
    ]


def pictures(way, other, mine="median", theirs="median"):
    """After how many pictures `way` has taken no longer than `other`, None when it never does.

    `mine` and `theirs`: which of "median", "p20" and "p80" each picks for its later pictures.
    """
    behind, gained = way.first_s - other.first_s, other.latency[theirs] - way.latency[mine]
    if behind <= 0:
        return 1
    if gained <= 0:
        return None
    after = 1 + math.ceil(behind / gained - 1e-9)  # of a whole number, but for its rounding
    return after if after <= MOST else None


def lines(result):
    """A line a way, in the order of HEADER; a row that failed has its reason. No line without eager bf16 to compare with."""
    found = ways(result)
    other = next((way for way in found if way.id == REFERENCE), None)
    failed = [[row["id"], row["label"], row["status"]] for row in result["rows"] if row["status"] != "ok"]
    return [*(_cells(way, other) for way in found if other), *failed]


def _cells(way, other):
    cells = [way.name, way.label, figures.seconds(way.first_s), figures.seconds(way.latency["median"])]
    if way is other:
        return [*cells, "", "", ""]
    middle, early, late = (pictures(way, other, *picked) for picked in (("median",) * 2, ("p20", "p80"), ("p80", "p20")))
    if middle is None:
        return [*cells, "never", "", ""]
    return [*cells, _counted(middle), f"{early:,} and {late:,}" if late else f"{early:,} and never", _span(way.after(middle))]


def break_even_figure(result_path, target):
    """Draw seconds against pictures of a peer study's ways into the PNG `target`, with the points where each has paid back.

    Raises UserError for a result file that is none, or a `target` that cannot be written. Introduced in notebooks/04_compile.
    """
    result = results.read(result_path)
    found = ways(result)
    other = next((way for way in found if way.id == REFERENCE), None)
    paid = {way.name: pictures(way, other) for way in found if other and way is not other}
    figure = figures.Plot(figsize=(12, 6.4))
    axes = figures.logarithmic(figure.subplots())
    last = 4 * max((n for n in paid.values() if n), default=25)
    steps = sorted({round(last ** (k / 200)) for k in range(201)})
    colours = dict(zip(dict.fromkeys(way.id for way in found if way is not other), SERIES, strict=False))
    handles = []
    for way in found:
        colour = INK if way is other else colours[way.id]
        style = {"color": colour, "linestyle": "--" if way.warm else "-", "linewidth": 2.2 if way is other else 1.6}
        axes.plot(steps, [way.after(n) for n in steps], **style)
        says = "" if way is other else f": {_counted(paid[way.name])}" if paid.get(way.name) else ": never" if other else ""
        handles.append(Line2D([], [], label=way.name + says, **style))
        if n := paid.get(way.name):
            axes.plot(n, way.after(n), "o", color=colour, markersize=8, markeredgecolor="white", zorder=3)
            text = axes.annotate(f"{n:,}", (n, way.after(n)), xytext=(7, -13), textcoords="offset points", color=INK)
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_xlim(1, last)
    axes.set_xlabel("pictures drawn (logarithmic)", color=QUIET)
    axes.set_ylabel("seconds since the pipeline was loaded (logarithmic)", color=QUIET)
    title = f"dots and numbers: pictures until a way\nhas caught up with {REFERENCE}"
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "alignment": "left"}
    axes.legend(handles=handles, title=title, frameon=False, fontsize=9, **beside)
    figures.title(figure, "When has a first call paid for itself?", result)
    figures.save(figure, target, [result_path])


def _counted(n):
    return f"{n:,} picture{'s' * (n != 1)}"


def _span(seconds):
    if seconds < 120:
        return figures.seconds(seconds)
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
