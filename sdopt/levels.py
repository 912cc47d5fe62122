"""Which rows of a quality study to take: the front of quality against latency, and three levels by a stated rule."""

from sdopt import results
from sdopt.errors import UserError

REFERENCE = "baseline_fp32"
AGAIN = "noise_seed"  # the baseline's work once more, from another seed
YARDSTICKS = ("noise_bf16", "bf16")  # bf16 against fp32, attention by SDPA and by the formula: two ways to round
FACTS = ("objects", "relations")
WHOLE = "prompts_all_right"
DRIFT = ("psnr_db", "ssim")
LOST = {"balanced": 0.02, "fastest": 0.10}  # how much of the objects, and of the relations, may be lost at most
LEVELS = ("lossless", *LOST)
AS_FAST = 1.10  # times the fastest median at most: the same work in a row of its own differed by 6 % in one recording
ABOUT = ("steps", "scheduler", "cutoff", "start", "stop", "seed", "runs", "int8_anyway", "int8_every_layer")


def pareto(result):
    """The rows of a quality study that no other beats, the fastest first: none is as fast and has more prompts all right.

    By median latency and the share of prompts of which everything is in the picture; yardsticks are no candidates.
    Introduced in notebooks/10_the_whole_path.
    """
    best, front = -1.0, []
    quality = lambda row: row["quality"][WHOLE]["value"]
    for row in sorted(_candidates(result), key=lambda row: (row["latency_s"]["median"], -quality(row))):
        if quality(row) > best:
            best = quality(row)
            front.append(row)
    return front


def recommended(result):
    """{"lossless": row, "balanced": row, "fastest": row} of a quality study: of those that qualify, the fastest.

    Of rows that are AS_FAST as the fastest it is that with the most prompts all right, and of equals the study's first.
    Raises UserError as `qualifying` does. Introduced in notebooks/10_the_whole_path.
    """
    return {level: _best(qualifying(result, level)) for level in LEVELS}


def qualifying(result, level):
    """The rows of a quality study that are good enough for a level, in the study's order.

    lossless: the drift from the baseline is within what bf16 alone does to it (mean PSNR and SSIM no lower than the
    intervals of YARDSTICKS reach), and adherence within the baseline's interval and not clearly worse (paired by prompt).
    balanced, fastest: no more than LOST of the objects, nor of the relations, is lost, even at the worse end of the
    paired interval; the drift may be any. The baseline qualifies for all, a row that was not compared with it for none.
    Raises UserError where it or the yardstick was not measured. Introduced in notebooks/10_the_whole_path.
    """
    rows = {row["id"]: row for row in result["rows"] if row["status"] == "ok"}
    missing = [i for i in (REFERENCE, YARDSTICKS[0]) if i not in rows]
    if missing:
        raise UserError(f"{result['study']} holds no {missing[0]} to compare with: measure that row")
    base, noise = rows[REFERENCE]["quality"], [rows[i]["quality"] for i in YARDSTICKS if i in rows]
    floor = {name: min(quality[name]["low"] for quality in noise) for name in DRIFT}

    def good_enough(row):
        quality = row["quality"]
        if quality["change"] is None:
            return row["id"] == REFERENCE
        if level in LOST:
            return all(quality["change"][fact]["low"] >= -LOST[level] for fact in FACTS)
        within = all(quality[name] and quality[name]["value"] >= floor[name] for name in DRIFT)
        kept = all(quality[f]["value"] >= base[f]["low"] and quality["change"][f]["high"] >= 0 for f in FACTS)
        return within and kept

    return [row for row in _candidates(result) if good_enough(row)]


def baselines(result):
    """The rows that do the baseline's work, REFERENCE and AGAIN, the faster first: speed-ups are counted from that.

    The GPU waits for Python in both, and a slow moment of the host would pass for everybody else's gain.
    """
    rows = [row for row in result["rows"] if row["status"] == "ok" and row["id"] in (REFERENCE, AGAIN)]
    return sorted(rows, key=lambda row: row["latency_s"]["median"])


def speedup(row, result):
    """How many times faster a row is than the baseline's work, and whether clearly so: see `results.compare`."""
    return results.compare(row, baselines(result)[0], about=ABOUT)


def _best(rows):
    fastest = min(rows, key=lambda row: row["latency_s"]["median"])
    as_fast = [row for row in rows if results.compare(fastest, row, about=ABOUT)["speedup"] <= AS_FAST]
    return max(as_fast, key=lambda row: row["quality"][WHOLE]["value"])  # the first of equals


def _candidates(result):
    return [row for row in result["rows"] if row["status"] == "ok" and row["family"] != "noise"]
