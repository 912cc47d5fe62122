"""Why a step is worth less or more here than where it was recorded: what was measured of both, and the likely reason."""

from sdopt import breakeven, figures
from sdopt.bench import notes
from sdopt.guidance import guided_steps
from sdopt.path import Options
from sdopt.sentences import BUSY
from sdopt.tables import first_upper
from sdopt.yours import ALL, DIFFERS

FAST = 1.5  # a number format whose products gain no more has no unit worth the name: casts and copies take the rest
LESS_WORK = ("dpm_20", "cfg_cutoff")  # steps that only leave work out: no machine is slower with them
SAME_CALL = ("tiny_vae", *LESS_WORK)  # and these start the kernels of a UNet call as the step before does
AGAIN = "measure again with nothing else running"


def reasons(lines, machine) -> list[str]:
    """A line for each step that does not help here, or gains clearly less or more than on a recorded machine.

    `lines`: what `yours.beside` returns; `machine`: the reader's. What stands after "likely" was not measured. Introduced
    in notebooks/10_the_whole_path.
    """
    said = []
    for line in (line for line in lines if line.step != ALL):
        there = "".join(f", {them.gain['speedup']:.2f}x on {name}" for name, them in line.recorded.items())
        if line.mine is None and line.step == "int8":
            said.append(f"int8: not taken here{there}. {first_upper(_int8_rates(machine))}; {_outlook(machine)}")
        if line.mine is None:
            continue
        gain, differ = line.mine.gain, [name for name in line.recorded if line.reads(name) != "like"]
        if differ or not (gain["clear"] and gain["speedup"] > 1):
            most = max(differ, key=lambda name: _apart(line.mine, line.recorded[name]), default=None)
            reason = first_upper(why(line.step, line.mine, line.recorded.get(most), machine))
            within = "" if gain["clear"] else " (within the spread)"
            which = f" (there: {most})" if most and len(line.recorded) > 1 else ""
            said.append(f"{line.step}: {gain['speedup']:.2f}x here{within}{there}. {reason}{which}")
    return said


def _apart(mine, theirs):
    ratio = mine.gain["speedup"] / theirs.gain["speedup"]
    return max(ratio, 1 / ratio)


def why(step, mine, other, machine) -> str:
    """Why a step is worth here what it is, against `other`, the same step elsewhere; None: it simply does not help."""
    wide = max(row["latency_s"]["p80"] / row["latency_s"]["p20"] for row in (mine.row, mine.before))
    if wide > notes.WIDE:
        return f"but p80 is {wide:.2f} times p20 here: {AGAIN}"
    if waits := notes.waits_longer(mine.row, mine.before):
        return f"measured: {waits}: {AGAIN}"
    if other and (waits := notes.waits_longer(other.row, other.before)):
        return f"measured there: {waits}"
    for taken, where in ((mine, "here"), (other, "there")) if step in SAME_CALL else ():
        if taken and notes.waits_longer(taken.before, taken.row):
            return f"measured {where}: {_busy_ms(taken.before)} in the row before it, which waited: part of that gain is its wait"
    if step in LESS_WORK and mine.gain["speedup"] * DIFFERS < 1:
        return f"but less work cannot take longer: {AGAIN}"
    less = other is None or mine.gain["speedup"] < other.gain["speedup"]
    told = REASONS[step](mine, other, machine, less) if step in REASONS else None
    if not told:
        told = f"likely because {notes.REASONS[step][machine.kind]}" if less else "nothing that was measured here says why"
    return told + (_place(step, mine, other) if other else "")


def _place(step, mine, other):
    """That two ladders took the compiler at different places, which is a difference of its own."""
    late = [i for i in mine.after if i not in other.after]
    if step == "compile":
        return f" (and here it comes after {', '.join(late)}, there before them)" if late else ""
    here, there = ("compile" in taken.after for taken in (mine, other))
    return "" if here == there else f" (and {'here' if here else 'there'} it comes after the compiler)"


def busy(row) -> float | None:
    """The share of the UNet's time in which the GPU's kernels were busy; None where no profile saw them."""
    if not row.get("unet_kernels"):
        return None
    return figures.kernels_ms(row) / row["stages_ms"]["unet"]


def _waits(row):
    """Whether the GPU waits for its work, as far as can be told."""
    share = busy(row)
    return share is not None and share < BUSY


def _at_work(row):
    return f"the GPU's kernels are busy for {busy(row):.0%} of the UNet's time"


def _busy(here, there=None):
    """The measured shares in words."""
    return _at_work(here) + " here" + (f" and {busy(there):.0%} there" if there and busy(there) is not None else "")


def _busy_ms(row):
    return f"kernels are busy for {figures.kernels_ms(row):.0f} ms of the UNet's {row['stages_ms']['unet']:.0f}"


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
    if not less and other and busy(row) is None and _waits(other.row):
        return f"measured there: {_at_work(other.row)}; likely it waits for launches, which this step makes no fewer"
    return None


def _bf16(mine, other, machine, less):
    faster, old = machine.faster(machine.half), machine.has("bf16 and TF32") is False
    measured = _product(machine, machine.half, "float32")
    limit = _launches(mine, other, less)
    if less and faster < FAST:
        lacks = f"{_capability(machine)} has no tensor cores (from 7.0), " if machine.has("tensor cores") is False else ""
        return f"{measured}; {lacks}likely no unit of this machine is faster in 16 bits"
    if less:
        return limit or f"{measured}, so the unit is there; likely layers this small do not fill it, or are not the limit"
    if old:
        slow = f"{_capability(machine)} has no TF32 (from 8.0), so likely the baseline's convolutions are slower here"
        return f"{measured}; {slow}" + (f"; {limit}" if limit else "")
    return limit or (f"{measured}; likely its float32 is further behind its 16 bits here than there" if faster > FAST else None)


def _sdpa(mine, other, machine, less):
    if less and machine.has("bf16 and TF32") is False:
        return f"flash and cuDNN attention need 8.0, this is {_capability(machine)}; likely another kernel saves less"
    return _launches(mine, other, less)


def _compile(mine, other, machine, less):
    if busy(mine.before) is None:
        return None
    waits, measured = _waits(mine.before), f"measured: {_busy(mine.before, other and other.before)}, before the step"
    if less and waits:
        return f"{measured}, so there are launches to save; likely what else it does gains little here"
    if less or waits:
        return f"{measured}; likely launches are what it saves" + (", and here they cost nothing" if less else "")
    return None


def _int8(mine, other, machine, less):
    if mine.row.get("as_run", {}).get("int8_layers") == 0:
        return "none of its layers was rounded here: the difference is that of two processes that do the same"
    return f"{_int8_rates(machine)}; likely rounding the inputs takes {'more' if less else 'less'} than the products save"


def _int8_rates(machine):
    if machine.faster("int8") is None:
        return f"int8 tensor cores came with 7.5, this is {_capability(machine)}"
    return _product(machine, "int8", _usual(machine))


def _usual(machine):
    """The format in which layers compute if they are not rounded: of 16 bits, or of 32 where nothing is gained by those."""
    return machine.half if machine.faster(machine.half) >= 1 else "float32"


def _product(machine, name, than):
    faster = machine.faster(name, than)
    if faster >= 1 / FAST:
        return f"measured: a large product is {faster:.1f} times as fast in {name} as in {than} here"
    return f"measured: a large product takes {1 / faster:.1f} times as long in {name} as in {than} here"


def _outlook(machine):
    worth = (machine.faster("int8", _usual(machine)) or 0) >= FAST
    return "it may be worth a try" if worth else "likely nothing is to be gained, since its inputs must be rounded as well"


def _tiny_vae(mine, other, machine, less):
    factors = [step.before["stages_ms"]["vae"] / step.row["stages_ms"]["vae"] for step in (mine, other) if step]
    return _by_amdahl("decoding", "vae", mine, other, factors, f"became {_both('{:.1f} times as fast', factors)}")


def _dpm_20(mine, other, machine, less):
    calls = [(step.before["stages_ms"]["unet_calls"], step.row["stages_ms"]["unet_calls"]) for step in (mine, other) if step]
    became = "has {1:.0f} calls for {0:.0f}".format(*calls[0])
    return _by_amdahl("the UNet", "unet", mine, other, [old / new for old, new in calls], became)


def _by_amdahl(name, stage, mine, other, factors, became):
    """What a step gains by the share of its stage: measured shares and factors, and whether they say what was seen."""
    shares = [share(step.before, stage) for step in (mine, other) if step]
    law = [1 / (1 - s + s / f) for s, f in zip(shares, factors, strict=True)]
    told = _both("{:.0%}", shares), _both("{:.2f}x", law)
    said = f"measured: {name} took {told[0]} of the row before and {became}, which alone makes {told[1]}"
    if other and (law[0] < law[1]) != (mine.gain["speedup"] < other.gain["speedup"]):
        return f"{said}, so it is not the reason; likely the spread from picture to picture is: measure again"
    return said


def _both(form, values):
    """One value, or that of here and that of there."""
    if len(values) == 1:
        return form.format(*values)
    return " and ".join(f"{form.format(value)} {where}" for value, where in zip(values, ("here", "there"), strict=True))


def _cfg_cutoff(mine, other, machine, less):
    steps = mine.row["stages_ms"]["unet_calls"]
    most = 2 * steps / (steps + guided_steps(Options().cutoff, steps))
    faster = [step.before["stages_ms"]["unet"] / step.row["stages_ms"]["unet"] for step in (mine, other) if step]
    told = f"measured: the UNet became {_both('{:.2f}x', faster)} as fast, and {most:.2f}x if half a batch took half the time"
    likely = "leaves more of this machine idle" if less else "fills this machine better"
    return _launches(mine, other, less) or f"{told}; likely a batch of one {likely}"


REASONS = {
    "bf16": _bf16,
    "sdpa": _sdpa,
    "compile": _compile,
    "int8": _int8,
    "tiny_vae": _tiny_vae,
    "dpm_20": _dpm_20,
    "cfg_cutoff": _cfg_cutoff,
}


def _capability(machine):
    return f"compute capability {machine.capability[0]}.{machine.capability[1]}"


def paid_back(lines) -> list[str]:
    """After how many pictures the compiler's first call has paid for itself, here and on the recorded machines: one line.

    Against the row before it, as `breakeven` counts. No line where nothing was compiled here. Introduced in
    notebooks/10_the_whole_path.
    """
    line = next((line for line in lines if line.step == "compile" and line.mine), None)
    if line is None:
        return []
    first, without = (figures.seconds(_way(row).first_s) for row in (line.mine.row, line.mine.before))
    told = "".join(f", {_after(them)} on {name}" for name, them in line.recorded.items())
    return [f"compile: its first call took {first} here, {without} without it. Paid back {_after(line.mine)} here{told}"]


def _way(row):
    first = (row.get("first_calls") or {}).get("cold_s") or row["first_call_s"]
    return breakeven.Way(row["id"], row["label"], False, first, row["latency_s"])


def _after(step):
    n = breakeven.pictures(_way(step.row), _way(step.before))
    return f"after {n:,} picture{'s' * (n != 1)}" if n else "never"
