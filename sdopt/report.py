"""The figures and pages made again from figures/data, and what the command line prints of a study."""

import json
import os
import re
from functools import partial
from pathlib import Path

from sdopt import (
    breakeven,
    cards,
    figures,
    frontfigures,
    gridfigures,
    gridtables,
    pathfigures,
    peerfigures,
    ratefigures,
    records,
    results,
    rooflinefigures,
    sentences,
    stagetables,
    sweepfigures,
    tables,
    timefigures,
)
from sdopt.errors import UserError
from sdopt.models import model

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("path", "peers", "engine", "break-even", "stages", "quality", "gate", "throughput", *gridtables.KINDS)
STUDIES = tuple(f"*-{kind}.json" for kind in KINDS)
LESSONS = ("kernels", "pocket-tradeoff", "fp8-shapes", "fp8-errors")  # what sdopt.bench.lessons measures for the notebooks
COPIED = ("[0-9]*-*.png", "reference.png", f"*{records.SUFFIX}")  # what lies in the folder of a study
OPENING = "<!-- sdopt "
BLOCK = re.compile(OPENING + r"(\w+) ([\w./-]+) -->\n(.*?)<!-- /sdopt -->", re.DOTALL)
STUDY_BLOCKS = {
    "table": tables.markdown,
    "headline": sentences.headline,
    "race": sentences.race,
    "budget": sentences.budget,
    "levels": tables.levels,
    "rates": stagetables.rates,
}
BLOCKS = STUDY_BLOCKS | {"published": tables.published, "kernels": tables.kernels} | cards.BLOCKS
FIGURE = "figure"  # a block that shows a study's figure
WHOLE = "study"  # a block with all that is shown of a study
SWEPT = {"schedulers": sweepfigures.schedulers_figure, "guidance": sweepfigures.guidance_figure}  # of a quality study, as blocks
KNOWN = (*BLOCKS, FIGURE, WHOLE, *SWEPT)
NOTEBOOKS = ("04_compile", "08_dpm_20", "09_cfg_cutoff", "10_the_whole_path", "13_fp8")
PAGES = ("README.md", "sdopt/pocket/README.md", *(f"notebooks/{name}.ipynb" for name in NOTEBOOKS))

MEASURED = {
    "path": "a process a row, one after the other",
    "peers": "all rows side by side, a picture each in turn",
    "stages": "a process a row, one after the other, each stage predicted before it is timed",
    "quality": "rows that share a pipeline in one process, each timed, then judged by many pictures",
    "shared": "rows that share a pipeline in one process, one after the other",
    "throughput": "a process a row, each with more pictures at once",
}

text = tables.text


def recorded(machine, study, root=None):
    """The result of `study` in figures/data/<machine>, None where there is none."""
    path = Path(root or ROOT) / "figures" / "data" / machine / f"{study}.json"
    return results.read(path) if path.exists() else None


def plan(study, rows, estimates, machine, done=()):
    """What `sdopt bench --dry-run` prints: a line a row with the time it may take, and the sum.

    `estimates` is {row id: seconds}, from a result recorded on `machine`; `done` the ids of rows that need no more work.
    """
    left = [row for row in rows if row.id not in done]
    took = {row.id: _duration(estimates[row.id]) if row.id in estimates else "no estimate" for row in left}
    took |= dict.fromkeys(done, "done")
    ids, labels, times = (max(map(len, column), default=0) for column in (took, [r.label for r in rows], took.values()))
    lines = [f"{row.id:{ids}}  {row.label:{labels}}  {took[row.id]:>{times}}" for row in rows]
    known = [estimates[row.id] for row in left if row.id in estimates]
    counted = f"{len(left)} row{'s' * (len(left) != 1)}" + (f" left of {len(rows)}" if done else "")
    total = f"{counted}: about {_duration(sum(known))}"
    if not left:
        total = f"all {len(rows)} rows are done: `sdopt report --add` takes them into figures/data"
    elif not known:
        total = f"{counted}; nothing of {study.name} is recorded on {machine}, so how long they take is not known"
    elif len(known) < len(left):
        total += f", and {len(left) - len(known)} more without an estimate"
    return "\n".join([f"{study.name}: {MEASURED[study.kind]}", "", *lines, "", total])


def _duration(seconds):
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def add(out, root=None):
    """Copy the studies that were measured into `out`, with pictures, records and searches, to figures/data/<machine>.

    And what `sdopt.bench.lessons` wrote there. Returns their names. What an older measurement left beside them goes. Raises
    UserError, before anything is copied, when `out` holds no study, or one that says less than what it would replace.
    """
    found = {path: results.read(path) for path in _studies(Path(out))}
    lessons = {path: _lesson(path) for name in LESSONS if (path := Path(out) / f"{name}.json").exists()}
    if not (found or lessons):
        raise UserError(f"{out} holds no result of a run: run `sdopt run --out {out}` first")
    data = Path(root or ROOT) / "figures" / "data"
    of_all = found | lessons
    targets = {path: data / results.machine_name(result["environment"]) / path.stem for path, result in of_all.items()}
    for path, result in found.items():
        _check_whole(path, result, targets[path].with_suffix(".json"))
    for path, result in lessons.items():
        _check_parts(path, result, targets[path].with_suffix(".json"))
    for path, result in found.items():
        target = targets[path]
        beside = {file.name: file for pattern in COPIED for file in path.with_suffix("").glob(pattern)}
        for name, file in sorted(beside.items()):
            results.write_whole(target / name, file.read_bytes())
        for old in (file for pattern in COPIED for file in target.glob(pattern)):
            if old.name not in beside:
                old.unlink()
        results.write(target.with_suffix(".json"), result)
        for searched in (Path(out) / "cache").glob(f"{result['settings']['model']}{results.SEARCHES}"):
            results.write_whole(target.with_name(searched.name), searched.read_bytes())
    for path in lessons:
        results.write_whole(targets[path].with_suffix(".json"), path.read_bytes())
    return ", ".join(path.name for path in of_all)


def _lesson(path):
    """What was measured for the notebooks. Raises UserError for a file that is something else."""
    result = results.read_json(path)
    try:
        machine, parts = results.machine_name(result["environment"]), _parts(result)
    except (AttributeError, KeyError, TypeError):
        machine, parts = None, {}
    if not (machine and parts):
        raise UserError(f"{path} is not what `python -m sdopt.bench.lessons` writes: measure it again")
    return result


def _parts(result):
    """{part: how much it says} of what was measured for the notebooks: measurements, or a row's numbers that are there."""
    if "rows" in result:
        return {row["id"]: sum(value is not None for value in row.values()) for row in result["rows"]}
    return {part: len(found) for part, found in result["metrics"].items()}


def _check_parts(path, result, older):
    """Raise UserError for what was measured for the notebooks if `older` says more in one of its parts."""
    now, before = _parts(result), _parts(_lesson(older)) if older.exists() else {}
    if lost := [part for part, said in before.items() if now.get(part, 0) < said]:
        raise UserError(f"{older} has parts that {path} lacks ({', '.join(lost)}): measure them too, or delete it first")


def _check_whole(path, result, older):
    """Raise UserError for a study that measured nothing, has nothing to be compared with, or lacks rows that `older` has."""
    if not any(row["status"] == "ok" for row in result["rows"]):
        raise UserError(f"{path} has no row that was measured: measure one first")
    if result["study"].endswith("-path"):
        figures.ends_of(result)
    tried, before = {row["id"] for row in result["rows"]}, results.read(older)["rows"] if older.exists() else []
    if lost := [row["id"] for row in before if row["status"] == "ok" and row["id"] not in tried]:
        raise UserError(f"{older} has rows that {path} lacks ({', '.join(lost)}): measure them too, or delete it first")


def _studies(folder, machines=""):
    return sorted(path for pattern in STUDIES for path in folder.glob(machines + pattern))


def renew(root=None):
    """Write every stale figure and every stale block of a page again; returns the paths written."""
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
    for path in _studies(data, "*/"):
        sources, drawings = _drawings(path)
        made = figures.digest(sources)
        for suffix, draw in drawings.items():
            target = root / "figures" / f"{path.parent.name}-{path.stem}{suffix}.png"
            if figures.source(target) != made:
                yield target, partial(draw, target)
    for page in (root / name for name in PAGES if (root / name).exists()):
        old = page.read_bytes()
        new = (_notebook if page.suffix == ".ipynb" else _page)(old, page, data)
        if new != old:
            yield page, partial(results.write_whole, page, new)


def _drawings(path):
    """The files a study's figures are drawn from, and {suffix of the figure's name: function of its path}."""
    result, pictures = results.read(path), path.with_suffix("")
    if tables.is_throughput(result):
        return [path], {"": partial(ratefigures.throughput_figure, path)}
    if tables.is_quality(result):  # the gate's few pictures are for the tests alone
        return [path], {} if path.stem.endswith("-gate") else _of_quality(path, result)
    if tables.is_stages(result):
        return [path], {"": partial(rooflinefigures.roofline_figure, path)}
    if tables.is_break_even(result):
        return [path], {"": partial(breakeven.break_even_figure, path)}
    if gridtables.kind(result):
        return gridfigures.sources(path), {"": partial(gridfigures.FIGURES[gridtables.kind(result)], path)}
    if tables.is_peers(result):
        drawings = {"": partial(peerfigures.peers_figure, path)}
        if path.stem.endswith("-peers"):
            drawings["-attention"] = partial(peerfigures.attention_figure, path)
    else:
        drawings = {
            "": partial(pathfigures.path_figure, path, pictures),
            "-stages": partial(timefigures.stages_figure, path, pictures),
        }
        if len(pathfigures.sources(path, pictures)) > 1 and figures.baseline(result["rows"]):
            drawings["-before-after"] = partial(pathfigures.before_and_after, path, pictures)
    if any(row.get("unet_kernels") for row in result["rows"]):
        drawings["-kernels"] = partial(timefigures.kernels_figure, path, pictures)
    return pathfigures.sources(path, pictures), drawings


def _of_quality(path, result):
    swept = {f"-{family}": partial(draw, path) for family, draw in SWEPT.items() if sweepfigures.rows_of(result, family)}
    return {"": partial(frontfigures.front_figure, path)} | swept


def _page(old, page, data):
    """The page with its blocks renewed; lines end as they did: git may check a page out with CR and LF."""
    words = old.decode()
    ending = "\r\n" if "\r\n" in words else "\n"
    return _renewed(words.replace("\r\n", "\n"), page, data).replace("\n", ending).encode()


def _notebook(old, page, data):
    """The notebook with the blocks in its markdown cells renewed, as nbformat writes it; as it was if none changed."""
    notebook, changed = results.read_json(page), False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        new = _renewed(source, page, data) if cell["cell_type"] == "markdown" else source
        if new != source:
            cell["source"], changed = new.splitlines(keepends=True), True
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode() if changed else old


def _renewed(words, page, data):
    if len(BLOCK.findall(words)) != words.count(OPENING):  # the text up to the end of the next would be lost
        raise UserError(f"a block in {page} is not closed: end each with a line <!-- /sdopt -->")
    return BLOCK.sub(lambda found: _block(found, page, data), words)


def _block(found, page, data):
    kind, study, _ = found.groups()
    if kind not in KNOWN:
        raise UserError(f"a page asks for an unknown block '{kind}': use one of {', '.join(KNOWN)}")
    source, said = data / f"{study}.json", ""
    if kind == WHOLE and source.stem.rpartition("-")[2] not in gridtables.KINDS:
        raise UserError(f"{page} asks for all of {source.stem}, which is none of these: *-{', *-'.join(gridtables.KINDS)}")
    if source.exists():  # what is not measured yet leaves its place empty
        if kind in (FIGURE, WHOLE, *SWEPT):
            result, suffix = results.read(source), f"-{kind}" if kind in SWEPT else ""
            drawn = os.path.relpath(data.parent / f"{study.replace('/', '-')}{suffix}.png", page.parent)
            if not suffix or sweepfigures.rows_of(result, kind):
                said = (_whole if kind == WHOLE else _figure)(result, drawn)
        else:
            said = BLOCKS[kind]((results.read if kind in STUDY_BLOCKS else results.read_json)(source)) + "\n"
    return f"{OPENING}{kind} {study} -->\n{said}<!-- /sdopt -->"


def _figure(result, drawn):
    return f"![{figures.described(result)}]({drawn})\n"


def _whole(result, drawn):
    """A heading, how to read it, the table and the figure of a study."""
    title, words = gridtables.WORDS[gridtables.kind(result)]
    title = f"{tables.first_upper(model(result['settings']['model']).title)}: {title}"
    return f"#### {title}\n\n{words}\n\n{tables.markdown(result)}\n\n![{title}]({drawn})\n"
