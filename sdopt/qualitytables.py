"""The tables of a quality study, as text cells: all its rows, and the three levels that follow from them."""

from sdopt import figures, levels

HEADER = (
    *("row", "what", "median", "baseline /", "UNet samples", "objects", "relations", "all right"),
    *("PSNR", "SSIM", "Frechet"),
)
LEVELS_HEADER = ("level", "row", "what", "median", "baseline /", "objects", "relations", "PSNR")
RULE = (
    "lossless: mean PSNR and SSIM no lower than what bf16 alone does to the baseline, adherence within the baseline's "
    "interval and not clearly worse. balanced and fastest: no more than {balanced:.0%} and {fastest:.0%} of the objects, "
    "nor of the relations, lost, even at the worse end of the interval. Of the rows that qualify, the fastest; of those within "
    "{as_fast:.0%} of its median, the one with the most prompts all right"
)


def lines(result):
    """The rows as cells, in the order of HEADER; a row that failed has its reason."""
    measured = [row["id"] for row in result["rows"] if row["status"] == "ok"]
    based = levels.REFERENCE in measured
    return [
        [row["id"], row["label"], *(_cells(row, result, based) if row["status"] == "ok" else [row["status"]])]
        for row in result["rows"]
    ]


def remarks(result):
    """What the table cannot say: what was paired, how far Frechet distances are off, how bf16 and another seed compare."""
    rows = {row["id"]: row for row in result["rows"] if row["status"] == "ok"}
    said = [
        f"95 % intervals over {result['settings']['pictures']:,} prompts, a picture each; PSNR and SSIM against the "
        "baseline's picture from the same noise, where no other noise is drawn"
    ]
    distance = (rows.get(levels.REFERENCE, {}).get("quality") or {}).get("frechet")
    if distance:
        said.append(
            f"Frechet distance to renders of the prompts' scenes, in the oracle's features: of {distance['n']:,} pictures "
            f"it comes out {distance['bias']:.2f} too large"
        )
    if levels.YARDSTICKS[0] in rows:
        front = ", ".join(row["id"] for row in levels.pareto(result))
        said.append(f"no row is as fast and has more prompts all right than one of these: {front}")
    if repeated := again(result):
        said.append(repeated)
    return said


def level_lines(result):
    """The three levels as cells, in the order of LEVELS_HEADER: what each is, how fast, and its price."""
    told = []
    for level, row in levels.recommended(result).items():
        quality, change = row["quality"], row["quality"]["change"]
        prices = [_points(change[fact]) if change else "" for fact in levels.FACTS]
        drift = quality["psnr_db"]
        told.append([level, row["id"], row["label"], *_speed(row, result), *prices, _spread(drift, 1, " dB")])
    return told


def rule():
    """The rule of the levels, in words."""
    return RULE.format(**levels.LOST, as_fast=levels.AS_FAST - 1)


def again(result):
    """How well the baseline's time repeats, where its work was timed again and took another time."""
    took = [(row["id"], row["latency_s"]["median"]) for row in levels.baselines(result)]
    if len(took) < 2 or took[1][1] <= levels.AS_FAST * took[0][1]:
        return ""
    (fast, seconds), (slow, more) = took
    return (
        f"speed-ups are counted from {fast}, {figures.seconds(seconds)}: {slow} took {figures.seconds(more)} for the same "
        "work in the same process, because the GPU waits for Python there and the host was not steady"
    )


def _cells(row, result, based):
    quality = row["quality"]
    median, gain = _speed(row, result) if based else (figures.seconds(row["latency_s"]["median"]), "")
    return [
        *(median, gain, str(row["unet_samples"])),
        *(_spread(quality[fact], 1, " %", 100) for fact in (*levels.FACTS, levels.WHOLE)),
        *(_spread(quality["psnr_db"], 1, " dB"), _spread(quality["ssim"], 4), _spread(quality["frechet"], 2)),
    ]


def _speed(row, result):
    gain = "" if row is levels.baselines(result)[0] else f"{levels.speedup(row, result)['speedup']:.2f}x"
    return figures.seconds(row["latency_s"]["median"]), gain


def _spread(share, digits, unit="", times=1):
    """A value and its interval for people: "99.0 % (98.8 to 99.3)"; nothing where it was not measured."""
    if not share or not share["n"]:
        return ""
    value, low, high = (f"{times * share[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"


def _points(change):
    """A paired change of a share in points of a hundred: "-0.3 points (-0.6 to +0.1)"."""
    if not change["n"]:
        return ""
    value, low, high = (f"{100 * change[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} points ({low} to {high})"
