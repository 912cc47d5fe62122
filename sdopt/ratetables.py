"""The table of a throughput study, as text cells: pictures a second by batch, and what share of the GPU's products they are."""

from statistics import median

from sdopt import figures

FORMATS = "bfloat16", "fp8"
HEADER = (
    *("row", "what", "images/s", "a call", "p20 to p80", "first call", "peak memory"),
    *("TFLOP/s", "of bf16's ceiling", "of fp8's"),
)
NOT_MLPERF = (
    "the work of MLPerf Inference's SDXL benchmark, 20 steps of Euler with guidance 8 at 1024x1024, on random weights and one "
    "prompt, without its harness and its quality gate: not an MLPerf result"
)


def ceilings(rows):
    """The rates that shares are of, {"bfloat16", "fp8"}: TFLOP/s of a large square product, medians of those measured beside `rows`.

    One alone is no yardstick: they differ by a tenth and more. Introduced in notebooks/13_fp8.
    """
    found = _found(rows)
    return {name: median(found[name]) for name in FORMATS if name in found}


def lines(result):
    """The rows as cells, in the order of HEADER; a row that failed has its reason."""
    most = ceilings(result["rows"])
    return [
        [row["id"], row["label"], *(_cells(row, most) if row["status"] == "ok" else [row["status"]])] for row in result["rows"]
    ]


def remarks(result):
    """What the table cannot say: whose work it is, and what the ceilings are."""
    told = [f"{name} {min(found):,.0f} to {max(found):,.0f} TFLOP/s" for name, found in _found(result["rows"]).items()]
    said = [NOT_MLPERF] if result["study"] == "sdxl-throughput" else []
    about = "the ceilings, medians of a large square product that was measured beside each row"
    return [*said, f"{about}: {', '.join(told)}"] if told else said


def _found(rows):
    found = {}
    for row in rows:
        for name, most in row.get("ceiling_tflops", {}).items():
            found.setdefault(name, []).append(most)
    return found


def _cells(row, most):
    latency, rate = row["latency_s"], row["rate"]
    return [
        f"{rate['images_per_s']:.2f}",
        figures.seconds(latency["median"]),
        f"{figures.seconds(latency['p20'])[:-2]} to {figures.seconds(latency['p80'])[:-2]}",
        figures.seconds(row["first_call_s"]),
        f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"{rate['tflops']:,.0f}",
        *(f"{rate['tflops'] / most[name]:.0%}" if name in most else "" for name in FORMATS),
    ]
