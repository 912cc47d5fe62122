"""What people read: the table of a path study, and the figures and README made again from figures/data."""

import re
from functools import partial
from pathlib import Path

from sdopt import cards, figures, pathfigures, results
from sdopt.bench.notes import SUBJECTS
from sdopt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- sdopt (\w+) ([\w./-]+) -->\n)(.*?)(<!-- /sdopt -->)", re.DOTALL)
COMPILED = {
    "whole": "UNet and VAE decoder compiled whole, one graph each",
    "regional": "regional compilation, the UNet's attention blocks alone",
}
HEADER = (
    *("step", "median", "p20 to p80", "first call", "peak memory", "baseline /", "before /"),
    *("objects", "relations", "PSNR to baseline", "to before"),
)


def table(result):
    """A path study as text cells, the first line HEADER: times, memory, speed-ups, and what the pictures show.

    A column that no row fills (what random weights draw is not judged) is left out.
    """
    lines, before = [HEADER], None
    base = figures.baseline(result["rows"])
    for row in result["rows"]:
        measured = row["status"] == "ok"
        lines.append([row["id"], *(_cells(row, base, before) if measured else [row["status"]])])
        before = row if measured else None
    filled = [k for k in range(len(HEADER)) if any(len(line) > k and line[k] for line in lines[1:])]
    return [[line[k] for k in filled] if len(line) > 2 else [*line, *[""] * (len(filled) - 2)] for line in lines]


def _cells(row, base, before):
    latency, quality = row["latency_s"], row["quality"] or {}
    return [
        figures.seconds(latency["median"]),
        f"{figures.seconds(latency['p20'])[:-2]} to {figures.seconds(latency['p80'])[:-2]}",
        figures.seconds(row["first_call_s"]),
        f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        _gain(row, base),
        _gain(row, before),
        *(figures.count(quality[fact]) if quality.get(fact, {}).get("n") else "" for fact in ("objects", "relations")),
        *(figures.decibels(quality[d]) if quality.get(d) else "" for d in ("against_baseline", "against_previous")),
    ]


def _gain(row, other):
    return f"{results.compare(row, other, about=SUBJECTS)['speedup']:.2f}x" if other and other is not row else ""


def remarks(result):
    """What the table cannot say: how the compiled rows were compiled, the layout alone, and the steps that did not help."""
    said = []
    for row in result["rows"]:
        if row["status"] != "ok":
            continue
        if row["id"] == "compile":
            said.append(f"compile and after: {COMPILED[row['as_run']['compiled']]}")
        apart = row.get("apart", {}).get("channels_last", {})
        if "latency_s" in apart:
            median = figures.seconds(apart["latency_s"]["median"])
            said.append(f"compile: the channels_last layout alone, uncompiled, takes {median}")
        if row.get("note"):
            said.append(f"{row['id']}: {row['note']}")
    return said


def text(result):
    """The table and its remarks for a terminal."""
    cells = table(result)
    widths = [max(len(line[k]) for line in cells if not line[1].startswith("failed")) for k in range(len(cells[0]))]
    lines = [
        f"{line[0]:{widths[0]}}  {line[1]}"
        if line[1].startswith("failed")
        else "  ".join([f"{line[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    return "\n".join([figures.described(result), "", *(line.rstrip() for line in lines), "", *remarks(result)]).rstrip()


def _markdown(result):
    header, *lines = table(result)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_first_upper(figures.described(result))}; {_versions(result)}.\n\n{rows}\n\n" + "\n".join(
        f"- {remark}" for remark in remarks(result)
    )


def _versions(result):
    names = ("torch", "diffusers", "transformers", "torchao")
    return ", ".join(f"{name} {result['environment'][name]}" for name in names)


def _first_upper(words):
    return words[0].upper() + words[1:]


def _headline(result):
    first, last = figures.ends_of(result)
    gain = results.compare(last, first, about=SUBJECTS)["speedup"]
    return (
        f"The same prompt and the same noise, by the baseline in {figures.seconds(first['latency_s']['median'])} and at "
        f"the end of the path in {figures.seconds(last['latency_s']['median'])}: {gain:.1f} times faster on "
        f"{result['environment']['gpu'] or result['environment']['cpu']}."
    )


BLOCKS = {"table": _markdown, "headline": _headline} | cards.BLOCKS
PAGES = ("README.md", "sdopt/pocket/README.md")


def add(out, root=None):
    """Copy the path studies that `sdopt run` wrote into `out`, with their pictures, to figures/data/<machine>."""
    found = sorted(Path(out).glob("*-path.json"))
    if not found:
        raise UserError(f"{out} holds no result of a run: run `sdopt run --out {out}` first")
    for path in found:
        result = results.read(path)
        target = Path(root or ROOT) / "figures" / "data" / results.machine_name(result["environment"]) / path.stem
        for picture in sorted(path.with_suffix("").glob("[0-9]*-*.png")):
            results.write_whole(target / picture.name, picture.read_bytes())
        results.write(target.with_suffix(".json"), result)
    return ", ".join(path.name for path in found)


def renew(root=None):
    """Write every stale figure and README block again; returns the paths written."""
    written = []
    for path, make in _stale(Path(root or ROOT)):
        make()
        written.append(path)
    return written


def stale(root=None):
    """The figures and pages that no longer match figures/data."""
    return [path for path, _ in _stale(Path(root or ROOT))]


def _stale(root):
    data = root / "figures" / "data"
    if not data.is_dir():
        raise UserError(f"{data} is not there: `sdopt report` works in a checkout of the repository")
    for path in sorted(data.glob("*/*-path.json")):
        pictures, name = path.with_suffix(""), f"{path.parent.name}-{path.stem}"
        made = pathfigures.digest(path, pictures)
        drawings = {"": pathfigures.path_figure}
        if results.read(path)["settings"]["weights"] != "random":
            drawings["-before-after"] = pathfigures.before_and_after
        for suffix, draw in drawings.items():
            target = root / "figures" / f"{name}{suffix}.png"
            if pathfigures.source(target) != made:
                yield target, partial(draw, path, pictures, target)
    for page in (root / name for name in PAGES if (root / name).exists()):
        old = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda found: _block(found, data), old)
        if new != old:
            yield page, partial(results.write_whole, page, new.encode())


def _block(found, data):
    opening, kind, study, _, closing = found.groups()
    if kind not in BLOCKS:
        raise UserError(f"a page asks for an unknown block '{kind}': use one of {', '.join(BLOCKS)}")
    read = results.read_json if kind in cards.BLOCKS else results.read
    return f"{opening}{BLOCKS[kind](read(data / f'{study}.json'))}\n{closing}"
