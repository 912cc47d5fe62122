"""The tables of a study of stages, as text cells: each stage of each row against its prediction and the ceilings."""

import statistics

from sdopt import pagetables
from sdopt.figures import NAMES, described, profiled_calls

HEADER = (
    *("step", "stage", "run", "predicted", "measured", "measured / predicted", "limit", "TFLOP", "TFLOP/s"),
    *("of its ceiling", "GB", "GB/s", "of a copy's"),
)
RATES_HEADER = ("step", "matrix products", "convolutions", "attention", "the rest", "between kernels")
RULE = (
    "predicted: the sum over a stage's operators of the longer of two times, its FLOPs at a large product's rate in its number "
    "format and its bytes (inputs, weights and outputs, once each) at a large copy's; run eagerly, no less than Python "
    "takes to start them all. fused: what is compiled or on our engine, its pointwise operators taken to cost nothing"
)
MARKED = 1.02  # stages longer than the call they are part of, beyond what two clocks differ by


def stages(row):
    """The stages of a measured row: a list of {"stage", "way", "predicted_ms", "ms", "limit", "flops", "bytes", "flops_per_s",
    "bytes_per_s", "of_flops", "of_bytes"}, the last two as shares of the row's ceilings; FLOPs None where there are none.
    """
    found, ceilings = [], row["roofline"]["ceilings"]
    for stage, counted in row["roofline"]["stages"].items():
        ms = row["stages_ms"][stage]
        flops = sum(counted["flops"].values()) or None
        at_best = sum(n / ceilings["flops_per_s"][name] for name, n in counted["flops"].items())
        found.append(
            {"stage": stage, "ms": ms, "flops": flops}
            | {key: counted[key] for key in ("way", "predicted_ms", "limit", "bytes")}
            | {"flops_per_s": 1e3 * flops / ms if flops else None, "bytes_per_s": 1e3 * counted["bytes"] / ms}
            | {"of_flops": 1e3 * at_best / ms if flops else None}
            | {"of_bytes": 1e3 * counted["bytes"] / ceilings["bytes_per_s"] / ms}
        )
    return found


def lines(result):
    """A line a row and stage, in the order of HEADER; a row that failed has its reason."""
    return [
        line
        for row in result["rows"]
        for line in (map(list, _cells(row)) if row["status"] == "ok" else [[row["id"], row["status"]]])
    ]


def _cells(row):
    for stage in stages(row):
        flops = ("", "", "")
        if stage["flops"]:
            flops = (_three(stage["flops"] / 1e12), _three(stage["flops_per_s"] / 1e12), f"{stage['of_flops']:.0%}")
        yield (
            *(row["id"], NAMES[stage["stage"]], stage["way"], _ms(stage["predicted_ms"]), _ms(stage["ms"])),
            *(f"{stage['ms'] / stage['predicted_ms']:.1f}x", stage["limit"]),
            *flops,
            *(_three(stage["bytes"] / 1e9), f"{stage['bytes_per_s'] / 1e9:,.0f}", f"{stage['of_bytes']:.0%}"),
        )


def rates(result):
    """What the GPU's kernels do in a picture's UNet calls, by kind, at each row of a study of stages, for a page."""
    said = "Inside the UNet's calls of a picture, what the GPU's kernels did, by kind, and how long it waited between them."
    about = described(result)
    return f"{said} {about[0].upper()}{about[1:]}.\n\n{pagetables.lined(RATES_HEADER, *_rates(result), words=1)}"


def _rates(result):
    """A line a row whose kernels a profile saw, in the order of RATES_HEADER: milliseconds of a picture's UNet calls by kind,
    with the rate of those that calculate, and what is left of the calls' time.
    """
    found = []
    for row in result["rows"]:
        if row["status"] == "ok" and row.get("unet_kernels"):
            kinds, ms = row["roofline"]["stages"]["unet"]["kinds"], row["stages_ms"]["unet"]
            calls = profiled_calls(row)
            spent = {kind: sum(n * call["ms"][kind] for n, call in calls) for kind in calls[0][1]["ms"]}
            cells = [
                _rate(kinds.get(kind, {"flops": 0})["flops"], spent[kind])
                for kind in ("matrix product", "convolution", "attention")
            ]
            found.append([row["id"], *cells, _ms(spent["other"]), _ms(max(0.0, ms - sum(spent.values())))])
    return found


def _rate(flops, ms):
    if not ms:
        return ""
    return _ms(ms) + (f", {flops / ms / 1e9:,.0f} TFLOP/s" if flops else "")


def remarks(result):
    """How the prediction is made, the ceilings, and whether the stages add up to the whole."""
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    if not rows:
        return []
    return [RULE, _ceilings(rows), *_whole(rows)]


def ceilings(rows):
    """The medians of the rows' ceilings: ({format: FLOP/s}, bytes/s, seconds a launch)."""
    each = [row["roofline"]["ceilings"] for row in rows]
    names = sorted({name for one in each for name in one["flops_per_s"]})
    middle = lambda values: statistics.median(list(values))
    rates = {name: middle(one["flops_per_s"][name] for one in each if name in one["flops_per_s"]) for name in names}
    return rates, middle(one["bytes_per_s"] for one in each), middle(one["launch_s"] for one in each)


def _ceilings(rows):
    rates, moved, launch = ceilings(rows)
    products = ", ".join(f"{name} {_three(rate / 1e12)}" for name, rate in rates.items())
    return (
        f"the ceilings, measured in each row's process, medians: products in TFLOP/s: {products}; a copy "
        f"{moved / 1e9:,.0f} GB/s; starting an operator {1e6 * launch:.1f} us"
    )


def _whole(rows):
    shares = {row["id"]: sum(s["ms"] for s in stages(row)) / row["roofline"]["call_ms"] for row in rows}
    least, most = min(shares, key=shares.get), max(shares, key=shares.get)
    marks = [row["roofline"]["call_ms"] / 1e3 / row["latency_s"]["median"] for row in rows]
    said = [
        f"the stages add up to {shares[least]:.1%} ({least}) to {shares[most]:.1%} ({most}) of the call they were read in; the "
        "rest is between them: guidance, tokens, the picture's way to PIL. Such a call takes "
        f"{min(marks):.2f} to {max(marks):.2f} times the median without marks"
    ]
    over = [i for i, share in shares.items() if share > MARKED]
    return [*said, *([f"more than the whole, so not to be trusted: {', '.join(over)}"] if over else [])]


def _ms(value):
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _three(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
