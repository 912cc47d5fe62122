"""Yours against ours: the steps as a reader's machine takes them, beside recorded ones, and what that machine can do."""

from dataclasses import dataclass

import torch
from matplotlib.patches import Patch

from sdopt import drawing, figures, gridtables, pagetables, results, roofline, timing
from sdopt.bench.row import unet_profile
from sdopt.errors import UserError
from sdopt.figures import INK, QUIET, SERIES
from sdopt.path import NUMBERS
from sdopt.precision import half_dtype

SHORT = 5  # steps of a picture that stands for a whole one
# What two machines' gains must differ by, beside their spread, before a reason is looked for: two processes of one machine
# that do the same differ by some percent (the recorded rows of int8 that rounded nothing), a short picture by some more.
DIFFERS = 1.1
UNITS = {  # NVIDIA's, and the compute capability that has each first
    "tensor cores": (7, 0),
    "int8 tensor cores": (7, 5),
    "bf16 and TF32": (8, 0),
    "fp8": (8, 9),
}
SIDE, COPIED = {"cuda": 4096, "cpu": 512}, {"cuda": 2**28, "cpu": 2**26}  # smaller than `roofline`'s: a second, not ten
ALL = "all of them"


@dataclass(frozen=True)
class Machine:
    """What can be told of a machine. `capability`: of a CUDA GPU, None for a CPU; `half`: its 16-bit format."""

    name: str
    capability: tuple[int, int] | None
    half: str
    ceilings: roofline.Ceilings

    @property
    def kind(self):
        return "cuda" if self.capability else "cpu"

    def has(self, unit):
        """Whether it has one of UNITS; None for a CPU, of which only the measured rates are told."""
        return self.capability >= UNITS[unit] if self.capability else None

    def faster(self, name, than="float32"):
        """How many times faster a large product is in the one number format than in the other; None if not measured."""
        rates = self.ceilings.flops_per_s
        return rates[name] / rates[than] if name in rates and than in rates else None


@dataclass(frozen=True)
class Taken:
    """A step as a machine took it: its row, the row before it, the ids of all before, its gain with both ends."""

    row: dict
    before: dict
    after: tuple[str, ...]
    gain: dict


@dataclass(frozen=True)
class Beside:
    """A step here, None where it was not taken, and on the recorded machines, {name: Taken}."""

    step: str
    mine: Taken | None
    recorded: dict[str, Taken]

    def reads(self, machine):
        """How the gain here is to that on a recorded machine: "less", "more" or "like"."""
        mine, theirs = self.mine.gain, self.recorded[machine].gain
        if mine["high"] < theirs["low"] and mine["speedup"] * DIFFERS < theirs["speedup"]:
            return "less"
        return "more" if mine["low"] > theirs["high"] and mine["speedup"] > theirs["speedup"] * DIFFERS else "like"


def machine(device: str) -> Machine:
    """What this machine can do, some of it measured: a second or two. Introduced in notebooks/10_the_whole_path."""
    kind, environment = torch.device(device).type, results.environment(device)
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    half = str(half_dtype(device)).removeprefix("torch.")
    formats = {"float32", half} | ({"int8"} if not capability or capability >= UNITS["int8 tensor cores"] else set())
    formats |= {"TF32"} if capability and capability >= UNITS["bf16 and TF32"] else set()
    found = roofline.ceilings(device, formats, SIDE[kind], COPIED[kind])
    return Machine(environment["gpu"] or environment["cpu"], capability, half, found)


def facts(machine: Machine) -> list[str]:
    """What can be told of a machine, in lines. Introduced in notebooks/10_the_whole_path."""
    said = [machine.name]
    if machine.capability:
        units = (f"{unit} {'yes' if machine.has(unit) else 'no (from %d.%d)' % first}" for unit, first in UNITS.items())
        said.append(f"compute capability {machine.capability[0]}.{machine.capability[1]}: {', '.join(units)}")
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in machine.ceilings.flops_per_s.items())
    moved, launch = machine.ceilings.bytes_per_s / 1e9, machine.ceilings.launch_s * 1e6
    measured = f"measured: products, TFLOP/s: {rates}; a copy {moved:,.3g} GB/s; starting an operator {launch:.1f} us"
    return [*said, measured]


def priced(id, pipe, task, call, steps: int = SHORT) -> dict:
    """A row of what `pipe` is now, from pictures of a few steps, reckoned up to the steps that `call` or the task has.

    What the text encoder and the VAE take is there once, all else grows with the steps (see `stretched`). On a GPU also
    "unet_kernels", as in a result file. `task`'s runs give the spread. Introduced in notebooks/10_the_whole_path.
    """
    numbers, _ = drawing.measure(pipe, task, **call | {"num_inference_steps": steps})
    whole = stretched(numbers, call.get("num_inference_steps", task.steps))
    return {"id": id, "label": id, "settings": {}, "status": "ok", "quality": None, **whole, **kernels(pipe, task, call)}


def kernels(pipe, task, call) -> dict:
    """What a profile of a few more steps says of the UNet's calls, {"unet_kernels": [...]}; nothing on a CPU.

    Introduced in notebooks/10_the_whole_path.
    """
    return unet_profile(pipe, task, call)[1] if pipe.device.type == "cuda" else {}


def stretched(numbers: dict, steps: int) -> dict:
    """What `drawing.measure` returned of a short picture, as one of `steps` steps would have it."""
    stages = numbers["stages_ms"]
    times, once = steps / stages["unet_calls"], (stages["text_encoder"] + stages["vae"]) / 1e3
    grown = {stage: stages[stage] * times for stage in ("unet", "scheduler")} | {"unet_calls": steps}
    runs = [once + (run - once) * times for run in numbers["latency_s"]["runs"]]
    return numbers | {"latency_s": timing.latency(runs), "stages_ms": stages | grown}


def walked(path, model: str) -> list[dict]:
    """The measured rows of a result file of `sdopt run`. Raises UserError for one that is none, or another model's."""
    result = results.read(path)
    if result["settings"]["model"] != model:
        raise UserError(f"{path} is a path of {result['settings']['model']}: give one of {model}, or set MODEL to it")
    return [row for row in result["rows"] if row["status"] == "ok"]


def taken(rows) -> dict[str, Taken]:
    """The steps among `rows`, a machine's in the order it took them, each against the row before it; the first has none."""
    rows = [row for row in rows if row["id"] in NUMBERS]
    ids = [row["id"] for row in rows]
    pairs = enumerate(zip(rows, rows[1:]), 1)
    return {row["id"]: Taken(row, old, tuple(ids[:n]), gridtables.gain(row, old)) for n, (old, row) in pairs}


def beside(mine, recorded) -> list[Beside]:
    """Each step here and on the recorded machines, in taught order, and ALL of them from first to last.

    `mine`: rows in the order they were taken; `recorded`: what `course.recorded` returns. Introduced in
    notebooks/10_the_whole_path.
    """
    theirs = {name: [row for other, row in recorded if other == name] for name in dict(recorded)}
    steps, found = taken(mine), {name: taken(rows) for name, rows in theirs.items()}
    lines = []
    for step in NUMBERS:
        others = {name: ladder[step] for name, ladder in found.items() if step in ladder}
        if step in steps or others:
            lines.append(Beside(step, steps.get(step), others))
    whole = {name: _whole(rows) for name, rows in theirs.items() if taken(rows)}
    return [*lines, Beside(ALL, _whole(mine), whole)]


def _whole(rows):
    first, *_, last = [row for row in rows if row["id"] in NUMBERS]
    return Taken(last, first, (first["id"],), gridtables.gain(last, first))


def table(lines: list[Beside]) -> str:
    """Steps beside each other as a table of a page: seconds and gain here, gains there, and how the first reads."""
    machines = list(lines[-1].recorded)
    header = ["step", "here", "its gain here", *(f"recorded: {name}" for name in machines), "so here it gains"]
    cells = []
    for line in lines:
        own = [figures.seconds(line.mine.row["latency_s"]["median"]), _shown(line.mine)] if line.mine else ["not taken", ""]
        told = [f"{line.reads(m)} than on {m}".replace("like than", "as") for m in line.recorded] if line.mine else []
        gains = [_shown(line.recorded[m]) if m in line.recorded else "" for m in machines]
        cells.append([line.step, *own, *gains, ", ".join(told)])
    return pagetables.lined(header, *cells, words=1)


def _shown(step):
    return f"{step.gain['speedup']:.2f}x" + ("" if step.gain["clear"] else " (within the spread)")


def gains_figure(lines: list[Beside]):
    """A bar a step and machine: how many times faster the step made it, p20 to p80; recorded ones hatched. For a notebook.

    Introduced in notebooks/10_the_whole_path.
    """
    machines = list(lines[-1].recorded)
    height = 0.8 / (1 + len(machines))
    figure = figures.Plot(figsize=(9, 1.3 + (0.32 + 0.24 * len(machines)) * len(lines)))
    axes = figure.subplots()
    axes.set_xscale("log")
    shown = [step.gain for line in lines for step in (line.mine, *line.recorded.values()) if step]
    low, high = min(0.9, *(g["low"] for g in shown)), max(g["high"] for g in shown)
    axes.set_xlim(low / 1.03, high ** 1.12)
    for y, line in enumerate(lines):
        for k, step in enumerate((line.mine, *(line.recorded.get(name) for name in machines))):
            at = y + (k - len(machines) / 2) * height
            if step is None:
                axes.text(1.01, at, "not taken" if k == 0 else "not recorded", va="center", fontsize=8, color=QUIET)
                continue
            gain, hatch = step.gain, "//" if k else None
            colour = SERIES[k % len(SERIES)]
            axes.barh(at, gain["speedup"] - 1, left=1, height=0.9 * height, color=colour, edgecolor="white", hatch=hatch)
            axes.plot([gain["low"], gain["high"]], [at, at], color=INK, linewidth=1.2)
            axes.annotate(
                f"{gain['speedup']:.2f}x", (max(1, gain["high"]), at), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
    figures.rows_down(axes, [line.step for line in lines])
    axes.axvline(1, color=INK, linewidth=0.8)
    ticks = [tick for tick in (0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50) if low / 1.03 <= tick <= high ** 1.12]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times faster than before the step (logarithmic); line: by p20 and p80 of both rows", color=QUIET)
    names = ["measured here", *(f"recorded: {name}" for name in machines)]
    handles = [
        Patch(facecolor=SERIES[k % len(SERIES)], edgecolor="white", hatch="//" if k else None, label=name)
        for k, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9)
    return figure
