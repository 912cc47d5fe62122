"""The table of a throughput study, as text cells: pictures a second by batch, and what share of the GPU's products they are."""

from sdopt import figures

HEADER = (
    *("row", "what", "images/s", "a call", "p20 to p80", "first call", "peak memory"),
    *("TFLOP/s", "of bf16's ceiling", "of fp8's"),
)
NOT_MLPERF = (
    "the work of MLPerf Inference's SDXL benchmark, 20 steps of Euler with guidance 8 at 1024x1024, on random weights and one "
    "prompt, without its harness and its quality gate: not an MLPerf result"
)


def lines(result):
    """The rows as cells, in the order of HEADER; a row that failed has its reason."""
    return [
        [row["id"], row["label"], *(_cells(row) if row["status"] == "ok" else [row["status"]])] for row in result["rows"]
    ]


def remarks(result):
    """What the table cannot say: whose work it is, and what the ceilings are."""
    most = {}
    for row in result["rows"]:
        for name, found in row.get("ceiling_tflops", {}).items():
            most.setdefault(name, []).append(found)
    told = [f"{name} {min(found):,.0f} to {max(found):,.0f} TFLOP/s" for name, found in most.items()]
    said = [NOT_MLPERF] if result["study"] == "sdxl-throughput" else []
    return [*said, f"the ceilings, a square product measured beside each row: {', '.join(told)}"] if told else said


def _cells(row):
    latency, rate = row["latency_s"], row["rate"]
    return [
        f"{rate['images_per_s']:.2f}",
        figures.seconds(latency["median"]),
        f"{figures.seconds(latency['p20'])[:-2]} to {figures.seconds(latency['p80'])[:-2]}",
        figures.seconds(row["first_call_s"]),
        f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"{rate['tflops']:,.0f}",
        *(f"{rate['of_ceiling'][name]:.0%}" if name in rate["of_ceiling"] else "" for name in ("bfloat16", "fp8")),
    ]
