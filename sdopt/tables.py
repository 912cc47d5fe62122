"""The tables people read, as text cells, for a terminal and for a page: path and peer studies, others' figures."""

import re

from sdopt import breakeven, figures, gridtables, pagetables, qualitytables, ratetables, results, stagetables
from sdopt.bench.notes import SUBJECTS
from sdopt.path import NUMBERS, step_before

COMPILED = {
    "whole": "UNet and VAE decoder compiled whole, one graph each",
    "regional": "regional compilation, the UNet's attention blocks alone",
}
HEADER = (
    *("step", "median", "p20 to p80", "first call", "warm", "peak memory", "baseline /", "before /"),
    *("objects", "relations", "PSNR to baseline", "to before"),
)
AGAINST = ("eager_bf16", "compile_reduce_overhead", "compile_max_autotune")  # the peers to beat
PEERS_HEADER = (
    *("peer", "what", "median", "p20 to p80", "first call", "warm", "peak memory"),
    *(*(f"{peer} /" for peer in AGAINST), "UNet, a call", "in kernels", "VAE", "attention"),
)
KERNELS_HEADER = ("kernel", "shape", "eager", "torch.compile", "ours", "ours, GB/s", "of a copy's speed")
FAILED = "failed: "


def table(result):
    """A study as text cells, the first line its header: times, memory, speed-ups, and of a path's pictures the quality.

    A row that failed has its reason in place of its numbers. A column that no row fills (what random weights draw is
    not judged) is left out.
    """
    if is_quality(result):
        header, lines = qualitytables.HEADER, qualitytables.lines(result)
    elif is_stages(result):
        header, lines = stagetables.HEADER, stagetables.lines(result)
    elif is_break_even(result):
        header, lines = breakeven.HEADER, breakeven.lines(result)
    elif gridtables.kind(result):
        header, lines = gridtables.table(result)
    elif is_throughput(result):
        header, lines = ratetables.HEADER, ratetables.lines(result)
    else:
        header, lines = (PEERS_HEADER, _peers(result)) if is_peers(result) else (HEADER, _path(result))
    lines = [header, *([*line, *[""] * (len(header) - len(line))] for line in lines)]
    filled = [k for k in range(len(header)) if k == 0 or any(line[k] for line in lines[1:])]
    return [[line[k] for k in filled] for line in lines]


def is_peers(result):
    """Whether the rows of a study took turns: others' ways beside each other, or beside the engine."""
    return result["study"].endswith(("-peers", "-engine", "-break-even"))


def is_break_even(result):
    """Whether a peer study is about first calls, and when each has paid for itself."""
    return result["study"].endswith("-break-even")


def is_stages(result):
    """Whether a study is about the stages of its rows: each has a prediction, and the ceilings it was made from."""
    return result["study"].endswith("-stages")


def is_quality(result):
    """Whether a study is about what many pictures show: its rows have intervals, and no step before."""
    return result["study"].endswith(("-quality", "-gate"))


def is_throughput(result):
    """Whether the rows of a study differ in how many pictures they draw at once."""
    return result["study"].endswith("-throughput")


def _measured(result):
    return [row for row in result["rows"] if row["status"] == "ok"]


def _path(result):
    base, measured = figures.baseline(result["rows"]), {row["id"]: row for row in _measured(result)}
    lines = []
    for row in result["rows"]:
        before = measured.get(step_before(row["id"]))
        lines.append([row["id"], *(_path_cells(row, base, before) if row["status"] == "ok" else [row["status"]])])
    return lines


def _path_cells(row, base, before):
    quality = row["quality"] or {}
    return [
        *_times(row),
        _gain(row, base),
        _gain(row, before),
        *(figures.count(quality[fact]) if quality.get(fact, {}).get("n") else "" for fact in ("objects", "relations")),
        *(figures.decibels(quality[d]) if quality.get(d) else "" for d in ("against_baseline", "against_previous")),
    ]


def _peers(result):
    others = {row["id"]: row for row in _measured(result)}
    return [
        [row["id"], row["label"], *(_peer_cells(row, others) if row["status"] == "ok" else [row["status"]])]
        for row in result["rows"]
    ]


def _peer_cells(row, others):
    stages = row["stages_ms"]
    return [
        *_times(row),
        *(_gain(row, others.get(peer)) for peer in AGAINST),
        f"{stages['unet'] / stages['unet_calls']:.1f} ms" if stages["unet_calls"] else "",
        f"{figures.kernels_ms(row) / stages['unet_calls']:.1f} ms" if row.get("unet_kernels") else "",
        f"{stages['vae']:.1f} ms",
        " and ".join(row.get("as_run", {}).get("attention") or ()),
    ]


def _times(row):
    """Median, spread, first call, the same with what was compiled on disk, peak memory."""
    latency, calls = row["latency_s"], row.get("first_calls")
    first, warm = (calls["cold_s"], calls["warm_s"]) if calls else (row["first_call_s"], None)
    return [
        figures.seconds(latency["median"]),
        f"{figures.seconds(latency['p20'])[:-2]} to {figures.seconds(latency['p80'])[:-2]}",
        figures.seconds(first) if first else "",
        figures.seconds(warm) if warm else "",
        f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
    ]


def _gain(row, other):
    return f"{results.compare(row, other, about=SUBJECTS)['speedup']:.2f}x" if other and other is not row else ""


def remarks(result):
    """What the table cannot say: how rows were compiled, attended and clocked, and the steps that did not help."""
    rows, said = _measured(result), []
    if is_quality(result):
        return [*qualitytables.remarks(result), *_gpu(result)]
    if is_stages(result):
        return [*stagetables.remarks(result), *_gpu(result)]
    if gridtables.kind(result):
        return [*gridtables.remarks(result), *_gpu(result)]
    if is_throughput(result):
        return [*ratetables.remarks(result), *_gpu(result)]
    if is_peers(result):
        runs = max((len(row["latency_s"]["runs"]) for row in rows), default=0)
        groups = {tuple(row.get("beside", ())) for row in rows}
        together = f"the peers took turns, a picture each, in another order in each of {runs} rounds"
        apart = "not all peers took turns with each other: a ratio of two that did not holds two moments of the machine"
        if len(rows) > 1:
            said.append(together if len(groups) == 1 else apart)
    if is_break_even(result):
        said.append(breakeven.RULE)
    for row in rows:
        if row["id"] == "compile":
            said.append(f"compile and after: {COMPILED[row['as_run']['compiled']]}")
        apart = row.get("apart", {}).get("channels_last", {})
        if "latency_s" in apart:
            median = figures.seconds(apart["latency_s"]["median"])
            said.append(f"compile: the channels_last layout alone, uncompiled, takes {median}")
        if row.get("note"):
            said.append(f"{row['id']}: {row['note']}")
    beside = [] if is_peers(result) else [row for row in rows if row["id"] not in NUMBERS]
    if beside:
        named = ", ".join(f"{row['id']} ({row['label']})" for row in beside)
        said.append(f"beside the nine steps, compared with the baseline alone: {named}")
    attended = [] if is_peers(result) else _attention(rows)
    return [*said, *breakeven.first_calls(rows), *attended, *_vae(rows), *_wide(rows), *_gpu(result)]


def _attention(rows):
    attended = {
        row["id"]: " and ".join(row["as_run"]["attention"]) for row in rows if row.get("as_run", {}).get("attention")
    }
    groups = {kind: [i for i in attended if attended[i] == kind] for kind in attended.values()}
    told = [f"{kind} in {_run_on(ids, list(attended))}" for kind, ids in groups.items()]
    return [f"attention in the UNet, by the kernels a profile found: {'; '.join(told)}"] if told else []


def _run_on(ids, order):
    """The `ids` as words, three or more that follow one another in `order` as "first to last"."""
    runs = []
    for i in ids:
        if runs and order.index(i) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _vae(rows):
    told = []
    for row in rows:
        unet, vae = (row.get("as_run", {}).get(key) for key in ("unet_dtype", "vae_dtype"))
        if vae and vae != unet:
            told.append(f"{row['id']}: the VAE runs in {vae}, the UNet in {unet}")
    return told


def _wide(rows):
    wide = [row["id"] for row in rows if row.get("as_run", {}).get("computes_in")]
    why = "this CPU has no instructions for 16-bit floats"
    return [f"{why}: layers compute in float32 and round in {_run_on(wide, [row['id'] for row in rows])}"] if wide else []


def _gpu(result):
    alone = result.get("gpu_while_timed")
    seen = [alone] if alone else [row["gpu"] for row in _measured(result) if row.get("gpu")]
    state, told = result.get("gpu_state") or {}, []
    for key, name, unit, most in (
        ("sm_clock_mhz", "SM clock", "MHz", "sm_clock_max_mhz"),
        ("power_w", "power", "W", "power_limit_w"),
    ):
        medians = [one[key]["median"] for one in seen if key in one]
        if medians:
            ends = dict.fromkeys(f"{end:,.0f}" for end in (min(medians), max(medians)))
            limit = f" (of at most {state[most]:,.0f})" if state.get(most) else ""
            told.append(f"{name} {' to '.join(ends)} {unit}{limit}")
    return [f"the GPU while {'all' if alone else 'each row'} was timed, medians: {', '.join(told)}"] if told else []


def text(result):
    """A study's table and its remarks for a terminal."""
    cells = table(result)
    widths = [max(len(line[k]) for line in cells if not line[k].startswith(FAILED)) for k in range(len(cells[0]))]
    lines = [_line(line, widths, _words(cells[0])) for line in cells]
    return "\n".join([figures.described(result), "", *lines, "", *remarks(result)]).rstrip()


def _words(header):
    """How many columns, from the left, hold words and not numbers."""
    return 3 if "stage" in header else 2 if "what" in header else 1


def _line(cells, widths, words):
    """Cells in their columns, the reason of a failure as long as it is: nothing follows it."""
    placed = [
        cell if cell.startswith(FAILED) else f"{cell:<{width}}" if k < words else f"{cell:>{width}}"
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(placed).rstrip()


def markdown(result):
    """A study's table and its remarks for a page, with what was measured where."""
    cells = table(result)
    grid = pagetables.lined(*cells, words=_words(cells[0]))
    said = "\n".join(f"- {remark}" for remark in remarks(result))
    return f"{first_upper(figures.described(result))}; {_versions(result)}.\n\n{grid}\n\n{said}".rstrip()


def levels(result):
    """The three levels of a quality study for a page: what each is, what it gains and its price, and by which rule."""
    grid = pagetables.lined(qualitytables.LEVELS_HEADER, *qualitytables.level_lines(result), words=3)
    told = " ".join(f"{first_upper(each)}." for each in (qualitytables.rule(), qualitytables.again(result)) if each)
    return f"{first_upper(figures.described(result))}; {_versions(result)}.\n\n{grid}\n\n{told}"


def kernels(result):
    """The fused kernels of a `kernels` study for a page, each beside what it replaces and a copy of as many bytes."""
    lines = []
    for row in result["metrics"]["fusions"]:
        seconds, shape = row["seconds"], " x ".join(map(str, row["shape"]))
        times = [f"{1e6 * seconds[way]:.1f} us" for way in ("eager", "compiled", "ours")]
        rate, share = row["bytes"] / seconds["ours"] / 1e9, seconds["copy"] / seconds["ours"]
        lines.append([row["kernel"], shape, *times, f"{rate:,.0f}", f"{share:.0%}"])
    about = f"{result['environment']['gpu']}, {result['settings']['dtype']}; {_versions(result)}"
    return f"{about}.\n\n{pagetables.lined(KERNELS_HEADER, *lines, words=2)}"


def _versions(result):
    names = ("torch", "diffusers", "transformers", "torchao")
    return ", ".join(f"{name} {result['environment'][name]}" for name in names)


def first_upper(words):
    return words[0].upper() + words[1:]


def published(content):
    """Others' published figures as a table for a page: what, on which hardware, the figures and where they stand."""
    lines = [
        (row["what"], row["hardware"] or "", _figures(row["figures"]), _link(row["source"])) for row in content["rows"]
    ]
    return pagetables.lined(("what", "hardware", "figures", "source"), *lines, words=4)


def _figures(values):
    """Figures as words, the unit once after the last of those that share it: "eager 54.5, compiled 66.0 it/s"."""
    told = ""
    for value, after in zip(values, [*values[1:], {"unit": None}], strict=True):
        ends = value["unit"] != after["unit"]
        told += f"{value['name']} {value['value']}" + (f" {value['unit']}; " if ends else ", ")
    return told.removesuffix("; ")


def _link(source):
    address = re.match(r"https://(?:github\.com/)?(.+)", source)
    return f"[{address[1]}]({source})" if address else source
