"""The tables of the studies whose rows share pipelines, as text cells: batches, the HPML project's rows, steps' worth."""

import math
from pathlib import Path

from sdopt import figures, results
from sdopt.bench.notes import SUBJECTS
from sdopt.path import STEPS

KINDS = ("batches", "hpml", "attribution")
WORDS = {  # what a study is about, and how to read it
    "batches": (
        "how many pictures at once",
        "A larger batch fills the GPU better until it is full; from then on it costs time and memory in proportion. What "
        "did not fit is told with its reason.",
    ),
    "hpml": (
        "the HPML project's rows",
        "The same configurations in the order of the project's own tables, in fp16 and with its mode of the compiler. Its GPU "
        "was another: what can be compared is how many times faster each row is than the baseline of its own machine.",
    ),
    "attribution": (
        "what each step is worth",
        "A ladder pays a step for what is left when its turn comes. Here each step is paid twice: where it is taught, upon "
        "those before it, and as if it came last, by what the whole path loses without it.",
    ),
}
WAYS = ("eager", "compiled", "engine")
GIB = 2**30
PUBLISHED = Path(__file__).resolve().parents[1] / "figures" / "data" / "published.json"
SAME = "the same"  # pipeline: a step that changed nothing
HPML_HEADER = (
    *("row", "what", "median", "p20 to p80", "first call", "peak memory", "baseline /"),
    *("published", "published, baseline /", "memory / baseline", "published, memory / baseline"),
)
ATTRIBUTION_HEADER = (
    *("step", "up to it", "memory", "its gain there"),
    *("the whole without it", "memory", "its gain in the whole"),
)


def kind(result):
    """Which of KINDS a study is, None for others."""
    name = result["study"].rpartition("-")[2]
    return name if name in KINDS else None


def table(result):
    """The header and the lines of such a study."""
    return {"batches": _batches, "hpml": _hpml, "attribution": _attribution}[kind(result)](result)


def remarks(result):
    """What the table cannot say: how it was measured, what failed and why, what steps are worth together."""
    failed = [f"{row['id']} {row['status']}" for row in result["rows"] if row["status"] != "ok"]
    return [*{"batches": _of_batches, "hpml": _of_hpml, "attribution": _of_attribution}[kind(result)](result), *failed]


def published(study):
    """What others published for the rows of `study`: {"s": {row id: seconds}, "GB": {row id: gigabytes}, "by": hardware}."""
    found = {"s": {}, "GB": {}, "by": None}
    rows = results.read_json(PUBLISHED)["rows"] if PUBLISHED.exists() else []
    for row in (row for row in rows if row.get("study") == study):
        found["by"] = row["hardware"]
        for figure in row["figures"]:
            found[figure["unit"]][figure["row"]] = figure["value"]
    return found


def measured(result):
    """The rows that were measured, by id."""
    return {row["id"]: row for row in result["rows"] if row["status"] == "ok"}


def batch_of(row, result):
    """How many pictures one call of a row draws."""
    return row["settings"].get("batch", result["settings"]["batch"])


def grid(result):
    """A study of batches as {way: {batch: row}}, ways in their order, batches ascending."""
    rows = sorted(result["rows"], key=lambda row: batch_of(row, result))
    return {way: {batch_of(row, result): row for row in rows if row["way"] == way} for way in WAYS}


def reason(row):
    """Why a row has no numbers, in a word or three."""
    return "out of memory" if "memory" in row["status"].lower() else "failed"


def gain(row, other):
    """How many times faster `row` is than `other`: {"speedup", "low", "high", "clear"}, the ends from p20 and p80."""
    a, b = row["latency_s"], other["latency_s"]
    return results.compare(row, other, about=SUBJECTS) | {"low": b["p20"] / a["p80"], "high": b["p80"] / a["p20"]}


def attributed(result):
    """What each step is worth: [{"step", "upto", "gain", "without", "last", "idle"}], in taught order.

    "upto" is the row with the steps up to this one, "gain" its gain over the one before; "without" the whole path without
    it, "last" what the path gains over that. None where a row was not measured. A step that is "idle" changed nothing: it
    shares both rows with the pipeline without it.
    """
    rows, told = measured(result), []
    ends = {part: {i: (row, other) for row in rows.values() for i, other in row[part].items()} for part in ("upto", "without")}
    for step in (step.id for step in STEPS):
        (upto, before), (without, whole) = (ends[part].get(step, (None, None)) for part in ("upto", "without"))
        told.append(
            {
                "step": step,
                "upto": upto,
                "gain": _gained(upto, rows.get(before)),
                "without": without,
                "last": _gained(rows.get(whole), without),
                "idle": upto is not None and upto["id"] == before,
            }
        )
    return told


def _gained(row, other):
    return gain(row, other) if row and other and row is not other else None


def _batches(result):
    ways, other = grid(result), published(result["study"])
    header = [
        "batch",
        *(f"{way}, s" for way in ways),
        *(f"{way}, images/s" for way in ways),
        *(f"{way}, GiB" for way in ways),
        *("published, s", "published, GB"),
    ]
    lines = []
    for batch in sorted({batch for rows in ways.values() for batch in rows}):
        rows = [ways[way].get(batch) for way in ways]
        medians = [row["latency_s"]["median"] if row and row["status"] == "ok" else None for row in rows]
        lines.append(
            [
                str(batch),
                *(_number(m) if m else reason(row) if row else "" for m, row in zip(medians, rows, strict=True)),
                *(f"{batch / m:.2f}" if m else "" for m in medians),
                *(f"{row['peak_memory_bytes'] / GIB:.1f}" if m else "" for m, row in zip(medians, rows, strict=True)),
                *(f"{other[unit][i]:g}" if (i := f"eager_{batch}") in other[unit] else "" for unit in ("s", "GB")),
            ]
        )
    return header, lines


def _of_batches(result):
    rows, other = measured(result), published(result["study"])
    labels = dict.fromkeys(row["label"].rpartition(", batch")[0] for row in result["rows"])
    said = [f"{'; '.join(labels)}: seconds a call, medians, prompt to pictures"]
    if rows:
        latencies = {i: row["latency_s"] for i, row in rows.items()}
        spread = {i: (latency["p80"] - latency["p20"]) / latency["median"] for i, latency in latencies.items()}
        widest = max(spread, key=spread.get)
        timed = [len(row["latency_s"]["runs"]) for row in rows.values()]
        fewer = f"{min(timed)} to {max(timed)} timed calls a row, the fewer of the large batches"
        calls = fewer if min(timed) < max(timed) else f"{timed[0]} timed calls a row"
        said.append(f"{calls}; p20 to p80 is at most {spread[widest]:.1%} of the median ({widest})")
    for way, by_batch in grid(result).items():
        calls = [(batch, row["first_call_s"]) for batch, row in by_batch.items() if row["status"] == "ok"]
        if calls:
            each = ", ".join(f"{figures.seconds(s)} at {batch}" for batch, s in calls)
            said.append(f"first call of a batch, {way}: {each}{_ahead(by_batch.values())}{_found(by_batch.values())}")
    if other["s"]:
        said.append(f"published: x-stable-diffusion's, of stock PyTorch in fp16 on an {other['by']}, as far as its table was filled")
    return said


def _ahead(rows):
    """Of rows that were compiled before anything was timed: that it was so, and their first calls with all of it on disk."""
    warm = [row["first_calls"]["warm_s"] for row in rows if row["status"] == "ok" and "first_calls" in row]
    if not warm:
        return ""
    seconds = " to ".join(dict.fromkeys(map(figures.seconds, (min(warm), max(warm)))))
    return f", compiled side by side; with all of it on disk {seconds}"


def _found(rows):
    found = [row["id"] for row in rows if row.get("graphs", {}).get("found") and "first_calls" not in row]
    return f"; compiled before, and found on disk: {', '.join(found)}" if found else ""


def _number(seconds):
    return figures.seconds(seconds).removesuffix(" s")


def _hpml(result):
    rows, other = measured(result), published(result["study"])
    base = rows.get("baseline")
    lines = []
    for row in result["rows"]:
        line = [row["id"], row["label"]]
        if row["status"] != "ok":
            lines.append([*line, row["status"]])
            continue
        latency, i = row["latency_s"], row["id"]
        theirs = {unit: other[unit].get(i) for unit in ("s", "GB")}
        ratios = [f"{gain(row, base)['speedup']:.2f}x" if base and base is not row else ""]
        ratios += [f"{theirs['s']:g} s" if theirs["s"] else ""]
        ratios += [f"{other['s']['baseline'] / theirs['s']:.2f}x" if theirs["s"] and i != "baseline" else ""]
        ratios += [f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}" if base and base is not row else ""]
        ratios += [f"{theirs['GB'] / other['GB']['baseline']:.2f}" if theirs["GB"] and i != "baseline" else ""]
        spread = f"{_number(latency['p20'])} to {_number(latency['p80'])}"
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        lines.append([*line, figures.seconds(latency["median"]), spread, figures.seconds(row["first_call_s"]), memory, *ratios])
    return HPML_HEADER, lines


def _of_hpml(result):
    rows, by = measured(result), published(result["study"])["by"]
    said = [f"published: the HPML project's figures, on an {by}: compare the ratios to the own baseline alone"] if by else []
    if {"compiled", "euler_30"} <= rows.keys():
        again = gain(rows["euler_30"], rows["compiled"])["speedup"]
        said.append(
            f"euler_30 is compiled once more, as in the project's tables: {again:.3f}x is what two measurements of one "
            "pipeline differ by"
        )
    if any(row.get("warm_from") for row in rows.values()):
        said.append(
            "rows of one pipeline follow one another in one process, so that a first call compiles what the rows before it in "
            f"there had no use for{_found(rows.values())}"
        )
    return said


def _attribution(result):
    lines = []
    for told in attributed(result):
        upto, without = (_time_and_memory(told[part]) for part in ("upto", "without"))
        gained = [SAME if told["idle"] else _shown(told[key]) for key in ("gain", "last")]
        lines.append([told["step"], *upto, gained[0], *without, gained[1]])
    return ATTRIBUTION_HEADER, lines


def _time_and_memory(row):
    return (figures.seconds(row["latency_s"]["median"]), f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB") if row else ("", "")


def _shown(gained):
    if not gained:
        return ""
    return f"{gained['speedup']:.2f}x" + ("" if gained["clear"] else " (within the spread)")


def _of_attribution(result):
    told = attributed(result)
    said = [
        "its gain there: the row before over the row up to it; its gain in the whole: the whole path without it over the whole, "
        "as if it were the last to come"
    ]
    there, last = (math.prod(step[key]["speedup"] for step in told if step[key]) for key in ("gain", "last"))
    said.append(
        f"the gains there multiply to {there:.1f}x, those in the whole to {last:.1f}x: a step is worth more where others have "
        "laid bare what it speeds up, and less where they speed up the same"
    )
    if any(step["step"] == "sdpa" and step["last"] for step in told):
        said.append(
            "sdpa: fused projections attend by SDPA anyway, so it is left out with them, and compared with the path without them"
        )
    idle = [step["step"] for step in told if step["idle"]]
    if idle:
        said.append(f"{', '.join(idle)}: rounds no layer on this GPU, so that the pipeline is the same with it and without")
    return said
