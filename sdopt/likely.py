"""Why a step is worth less or more here than where it was recorded: what was measured of both, and the likely reason."""

from sdopt import breakeven, figures
from sdopt.bench import notes
from sdopt.guidance import guided_steps
from sdopt.path import Options
from sdopt.sentences import BUSY
from sdopt.yours import ALL

FAST = 1.5  # a number format whose products gain no more has no unit worth the name: casts and copies take the rest


def reasons(lines, machine) -> list[str]:
    """A sentence for each step that does not help here, or gains clearly less or more than on a recorded machine.

    `lines`: what `yours.beside` returns; `machine`: the reader's. What stands after "likely" was not measured. Introduced
    in notebooks/10_the_whole_path.
    """
    said = []
    for line in lines:
        if line.step == ALL:
            continue
        if line.mine is None:
            said += _not_taken(line, machine)
            continue
        differ = [name for name in line.recorded if line.reads(name) != "like"]
        helps = line.mine.gain["clear"] and line.mine.gain["speedup"] > 1
        if differ or not helps:
            other = max((line.recorded[name] for name in differ), key=lambda them: _apart(line.mine, them), default=None)
            there = "".join(f", {line.recorded[name].gain['speedup']:.2f}x on {name}" for name in line.recorded)
            unclear = "" if line.mine.gain["clear"] else " (within the spread)"
            why = why_so(line.step, line.mine, other, machine)
            said.append(f"{line.step}: {line.mine.gain['speedup']:.2f}x here{unclear}{there}: {why}")
    return said


def _apart(mine, theirs):
    ratio = mine.gain["speedup"] / theirs.gain["speedup"]
    return max(ratio, 1 / ratio)


def why_so(step, mine, other, machine) -> str:
    """Why a step is worth here what it is, against `other`, the same step elsewhere, or None: it simply did not help."""
    wide = max(row["latency_s"]["p80"] / row["latency_s"]["p20"] for row in (mine.row, mine.before))
    if wide > notes.WIDE:
        return f"but p80 is {wide:.2f} times p20 here: measure again with nothing else running"
    less = other is None or mine.gain["speedup"] < other.gain["speedup"]
    told = REASONS[step](mine, other, machine, less)
    if not told:
        known = notes.REASONS[step][machine.kind] if less else None
        told = f"likely because {known}" if known else "nothing that was measured here says why"
    return told + _place(step, mine, other)


def _place(step, mine, other):
    """What the gains of two ladders cannot be compared for: steps that came in another order."""
    if other is None or ("compile" in mine.after) == ("compile" in other.after) and step != "compile":
        return ""
    if step == "compile":
        late = set(mine.after) - set(other.after)
        return f" (here it comes after {', '.join(i for i in mine.after if i in late)}, there before)" if late else ""
    return f" ({'there' if 'compile' in other.after else 'here'} the UNet was compiled before it, and the other way round)"


def busy(row) -> float | None:
    """The share of the UNet's time in which the GPU's kernels were busy; None where no profile saw them."""
    if not row.get("unet_kernels"):
        return None
    return sum(n * sum(call["ms"].values()) for n, call in figures.profiled_calls(row)) / row["stages_ms"]["unet"]


def _waits(row):
    """Whether the GPU waits for its work, as far as can be told."""
    share = busy(row)
    return share is not None and share < BUSY


def _busy(here, there=None):
    """The measured shares in words."""
    told = f"the GPU's kernels are busy for {busy(here):.0%} of the UNet's time here"
    return told + (f" and {busy(there):.0%} there" if there and busy(there) is not None else "")


def share(row, stage) -> float:
    """The share of a picture's time that a stage takes."""
    return row["stages_ms"][stage] / 1e3 / row["latency_s"]["median"]


def _launches(mine, other, less):
    """Where one of two GPUs waits for Python and the other does not, the reason for any step that makes kernels faster."""
    row = mine.row if busy(mine.row) is not None else mine.before
    if less and _waits(row):
        return f"measured: {_busy(row)}; likely it waits for launches, which this step makes no fewer"
    if not less and other and busy(row) is not None and not _waits(row) and _waits(other.row):
        return f"measured: {_busy(row, other.row)}; likely launches hide there what the step saves"
    return None


def _bf16(mine, other, machine, less):
    faster = machine.faster(machine.half)
    measured = f"measured: a large product runs {faster:.1f} times as fast in {machine.half} as in float32 here"
    if less:
        if faster < FAST:
            lacks = "" if machine.has("tensor cores") is not False else f"{_capability(machine)} has no tensor cores, and "
            return f"{measured}; {lacks}likely no unit of this machine is faster in 16 bits"
        limit = _launches(mine, other, less)
        return limit or f"{measured}, so the unit is there; likely layers this small do not fill it, or are not the limit"
    if machine.has("bf16 and TF32") is False:
        return f"{measured}; {_capability(machine)} has no TF32, so that likely the baseline's convolutions are slower here"
    limit = _launches(mine, other, less)
    return limit or (f"{measured}; likely float32 is the slower of the two machines' formats here" if faster > FAST else None)


def _sdpa(mine, other, machine, less):
    if less and machine.has("bf16 and TF32") is False:
        return f"flash and cuDNN attention need compute capability 8.0; likely the kernel that {_capability(machine)} has saves less"
    return _launches(mine, other, less)


def _compile(mine, other, machine, less):
    share, there = busy(mine.before), other and other.before
    if share is None:
        return None
    if less and not _waits(mine.before):
        return f"measured: {_busy(mine.before, there)} before it; likely fewer launches save little where the GPU does not wait"
    if less:
        return f"measured: {_busy(mine.before, there)} before it, so launches are there to be saved; likely its place is the reason"
    return f"measured: {_busy(mine.before, there)} before it; likely launches are what it saves" if _waits(mine.before) else None


def _fused_qkv(mine, other, machine, less):
    return None


def _int8(mine, other, machine, less):
    if mine.row.get("as_run", {}).get("int8_layers") == 0:
        return "none of its layers was rounded here: the difference is that of two processes that do the same"
    rates = _int8_rates(machine)
    return f"{rates}; {_int8_outlook(machine) if less else 'likely the products are large enough to fill it'}"


def _int8_rates(machine):
    faster = machine.faster("int8", machine.half)
    if faster is None:
        return f"{_capability(machine)} has no int8 tensor cores (from 7.5)"
    return f"measured: a large product runs {faster:.1f} times as fast in int8 as in {machine.half} here"


def _int8_outlook(machine):
    faster = machine.faster("int8", machine.half)
    if faster is None or faster < 1:
        return "likely nothing is to be gained"
    return "likely the rounding of the inputs takes what the products save" if faster < 2 else "likely layers this small do not fill it"


def _not_taken(line, machine):
    if line.step != "int8":
        return []
    there = ", ".join(f"{them.gain['speedup']:.2f}x on {name}" for name, them in line.recorded.items())
    outlook = "worth a try" if (machine.faster("int8", machine.half) or 0) >= FAST else "likely nothing is to be gained"
    return [f"int8: not taken here, {there}: {_int8_rates(machine)}; {outlook}"]


def _tiny_vae(mine, other, machine, less):
    here, there = (step and share(step.before, "vae") for step in (mine, other))
    factors = [f"{step.before['stages_ms']['vae'] / step.row['stages_ms']['vae']:.1f}" for step in (mine, other) if step]
    if not other:
        return f"measured: decoding was {here:.0%} of the row before, and became {factors[0]} times as fast"
    return (
        f"measured: decoding was {here:.0%} of the row before here and {there:.0%} there, and became {factors[0]} and "
        f"{factors[1]} times as fast"
    )


def _dpm_20(mine, other, machine, less):
    calls, old = mine.row["stages_ms"]["unet_calls"], mine.before["stages_ms"]["unet_calls"]
    here, there = (step and share(step.before, "unet") for step in (mine, other))
    beside = f" and {there:.0%} there" if other else ""
    return (
        f"it takes {calls:.0f} UNet calls instead of {old:.0f} on any machine; measured: these were {here:.0%} of the row before "
        f"here{beside}, and all else stays"
    )


def _cfg_cutoff(mine, other, machine, less):
    limit = _launches(mine, other, less)
    if limit:
        return limit
    steps = mine.row["stages_ms"]["unet_calls"]
    most = 2 * steps / (steps + guided_steps(Options().cutoff, steps))
    here, there = (step and step.before["stages_ms"]["unet"] / step.row["stages_ms"]["unet"] for step in (mine, other))
    beside = f" and {there:.2f} there" if other else ""
    told = f"measured: the UNet became {here:.2f} times as fast here{beside}, where half the batch in half the time would make {most:.2f}"
    return f"{told}; likely a batch of one {'leaves more of this machine idle' if less else 'fills this machine better'}"


REASONS = {
    "bf16": _bf16,
    "sdpa": _sdpa,
    "compile": _compile,
    "fused_qkv": _fused_qkv,
    "int8": _int8,
    "tiny_vae": _tiny_vae,
    "dpm_20": _dpm_20,
    "cfg_cutoff": _cfg_cutoff,
}


def _capability(machine):
    return f"compute capability {machine.capability[0]}.{machine.capability[1]}"


def paid_back(lines) -> str | None:
    """After how many pictures the compiler's first call has paid for itself, here and on the recorded machines.

    Against the row before it; counted as in `breakeven`. None where nothing was compiled here. Introduced in
    notebooks/10_the_whole_path.
    """
    line = next((line for line in lines if line.step == "compile" and line.mine), None)
    if line is None:
        return None
    first, without = (figures.seconds(_way(row).first_s) for row in (line.mine.row, line.mine.before))
    each = [_after(line.mine), *(f"{_after(them)} on {name}" for name, them in line.recorded.items())]
    return f"compile: its first call took {first} here, {without} without it; paid back {each[0]} here" + "".join(
        f", {told}" for told in each[1:]
    )


def _way(row):
    first = (row.get("first_calls") or {}).get("cold_s") or row["first_call_s"]
    return breakeven.Way(row["id"], row["label"], False, first, row["latency_s"])


def _after(step):
    n = breakeven.pictures(_way(step.row), _way(step.before))
    return f"after {n:,} picture{'s' * (n != 1)}" if n else "never"
