"""Answers to the exercises of 10_the_whole_path, and mistakes that are often made."""

from math import prod

from sdopt.results import compare


def whole(stages, faster):
    after = sum(ms / faster.get(stage, 1.0) for stage, ms in stages.items())
    return sum(stages.values()) / after


def keep(rows):
    kept = []
    for before, row in zip(rows, rows[1:]):
        ratio = compare(row, before)
        if ratio["clear"] and ratio["speedup"] > 1:
            kept.append(row["id"])
    return kept


def by_median(rows):
    return [row["id"] for before, row in zip(rows, rows[1:]) if compare(row, before)["speedup"] > 1]


def any_clear(rows):
    return [row["id"] for before, row in zip(rows, rows[1:]) if compare(row, before)["clear"]]


def against_baseline(rows):
    return [row["id"] for row in rows[1:] if compare(row, rows[0])["clear"]]


def by_five_percent(rows):
    return [row["id"] for before, row in zip(rows, rows[1:]) if compare(row, before)["speedup"] > 1.05]


def below(ends):
    """The row's median, or its p80, below one end of the row before alone."""
    mine, theirs = ends

    def kept(rows):
        pairs = ((row["id"], row["latency_s"], before["latency_s"]) for before, row in zip(rows, rows[1:]))
        return [id for id, own, last in pairs if own[mine] < last[theirs]]

    return kept


def product(stages, faster):
    return prod(faster.values())


def weighted_mean(stages, faster):
    return sum(ms * faster.get(stage, 1.0) for stage, ms in stages.items()) / sum(stages.values())


ANSWERS = {"10.1": ["bf16", "tiny_vae", "fused_qkv", "int8", "compile"], "10.2": whole, "10.3": keep}

MISTAKES = {
    "10.1": [
        ["bf16", "compile", "fused_qkv", "int8", "tiny_vae"],  # as they are taught
        ["bf16", "tiny_vae", "int8", "fused_qkv", "compile"],  # quantised, then fused
        ["bf16", "fused_qkv", "int8", "tiny_vae", "compile"],  # a VAE quantised and then thrown away
        ["bf16", "compile"],
        "bf16",
    ],
    "10.2": [product, weighted_mean, lambda stages, faster: 2.1, 3],
    "10.3": [
        by_median, any_clear, against_baseline, by_five_percent, below(("median", "p20")), below(("p80", "median")),
        lambda rows: [row["id"] for row in rows],
    ],  # fmt: skip
}
