"""What a page says of a study in words, every number from its result file."""

from sdopt import figures, results
from sdopt.bench.notes import SUBJECTS
from sdopt.errors import UserError
from sdopt.tables import first_upper


def headline(result):
    """One sentence on a path study: its two ends, and the recommended path where it was measured."""
    first, last = figures.ends_of(result)
    said = (
        f"The same prompt and the same noise, by the baseline in {figures.seconds(first['latency_s']['median'])} and "
        f"at the end of the path in {figures.seconds(last['latency_s']['median'])}: {_times_faster(last, first)} on "
        f"{result['environment']['gpu'] or result['environment']['cpu']}."
    )
    for row in result["rows"]:
        if row["id"] == "recommended" and row["status"] == "ok":
            median = figures.seconds(row["latency_s"]["median"])
            said += f" {first_upper(row['label'])} takes {median}: {_times_faster(row, first)} than the baseline."
    if result["settings"]["weights"] == "random":
        said += " The weights are random: the times are the model's, the pictures are noise."
    return said


def budget(result):
    """Where the time of the whole path goes: what its UNet's kernels take, and so what no work on the rest can beat.

    Raises UserError for a study whose cfg_cutoff has no profile of its kernels.
    """
    first, row = figures.ends_of(result)
    profiled = sorted(row.get("unet_kernels", ()), key=lambda call: -call["samples"])
    if not profiled:
        raise UserError(f"{result['study']} has no profile of {row['id']}: measure it on a GPU with `sdopt bench`")
    calls = row["stages_ms"]["unet_calls"]
    guided = max(1, round(row["settings"].get("cutoff", 1.0) * calls)) if len(profiled) > 1 else calls
    counted = [(n, call) for n, call in zip((guided, calls - guided), profiled, strict=False)]
    kinds = {kind: sum(n * call["ms"][kind] for n, call in counted) for kind in profiled[0]["ms"]}
    kernels, whole, stages = sum(kinds.values()), 1e3 * row["latency_s"]["median"], row["stages_ms"]
    each = " and ".join(
        f"{n} calls of {sum(call['ms'].values()):.1f} ms on {_samples(call['samples'])}" for n, call in counted
    )
    return (
        f"At the end of the path a picture takes {whole:.0f} ms, of which the UNet's kernels are busy for "
        f"{kernels:.0f}: {each}. By kind: {', '.join(f'{kind} {ms:.0f} ms' for kind, ms in kinds.items())}. The text "
        f"encoder takes {stages['text_encoder']:.0f} ms, the VAE {stages['vae']:.0f}. Were nothing left but the UNet's "
        f"kernels as they are, the path would be {1e3 * first['latency_s']['median'] / kernels:.1f} times faster than "
        f"the baseline; it is {_times_faster(row, first)}."
    )


def _samples(n):
    return f"{n} sample{'s' * (n > 1)}"


def _times_faster(row, other):
    return f"{results.compare(row, other, about=SUBJECTS)['speedup']:.1f} times faster"
