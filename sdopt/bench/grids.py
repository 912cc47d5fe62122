"""The rows of the studies whose rows share pipelines, as data: batch after batch, the HPML project's, what each step is worth.

How long they take on an H200 at most, reckoned before their first run from nvidia-h200/*-path.json (`reckon`), which counts
one compilation after the other; side by side (`sharing.compile_ahead`) they take a third or a quarter of that:
- `sd15-batches` 15 minutes, 6 of them compiling; `sdxl-batches` 31, 11 of them compiling: torch.compile compiles UNet and
  decoder anew for each of the six batches, 63 and 105 s each; the engine captures new graphs in seconds. With a dynamic batch
  one compilation would do, but its kernels fit no batch as well, and the question here is how fast each way can draw. What a
  new batch costs first is told beside it.
- `sd15-hpml` 15 minutes, 14 of them max-autotune, as the project had it: five UNet graphs (the two samplers give the
  timestep in two dtypes, and a cutoff halves the batch) and two decoders.
- `sdxl-attribution` 24 minutes, 17 of them compiling. Rows that are one pipeline are one row, and rows of the same modules,
  sampled in different ways, are drawn by one process.
"""

from dataclasses import dataclass, field

import torch

from sdopt import drawing, guidance, path, quantization, timing
from sdopt.bench import recipes
from sdopt.bench.sweeps import CALLS, CUT, NINE, Sampled, sampling

BATCHES = (1, 2, 4, 8, 16, 24)
LARGE = 8  # pictures a call, from which on a third of the runs is timed: they take long, and differ little
FEWEST = 3
EAGER = ("bf16", "sdpa")
LOAD_S = 15.0  # of an estimate: a process, its imports and the weights
AUTOTUNED = 6.0  # times what compiling takes, 388 s for 63: nvidia-h200/sd15-searches.json.xz beside sd15-path.json
LIKE = {"bf16": "baseline_fp32", "sdpa": "bf16", "compile": "sdpa"}  # the path's row that takes as long without one of these
GRAPHS = {"unet": 0.7, "decoder": 0.3, "tiny": 0.1, "found": 0.2}  # of what compiling UNet and decoder takes


@dataclass(frozen=True)
class Shared(Sampled):
    """A row of such a study: a pipeline, how it samples, and how many pictures a call.

    `renewed`: the graphs of the row before are forgotten first. `told`: what the row says of itself beside its settings.
    For an estimate: the row of a path it is `like`, and the graphs it compiles `anew`, in what UNet and decoder take.
    """

    renewed: bool = False
    told: dict = field(default_factory=dict)
    like: str = "sdpa"
    anew: float = 0.0

    def runs(self, runs):
        """How many runs are timed where the study's own number is `runs`."""
        return max(runs // 3, min(runs, FEWEST)) if self.batch and self.batch >= LARGE else runs


WAYS = {  # of drawing a batch: label, what is applied, how long it takes
    "eager": ("bf16, eager", {"like": "sdpa"}),
    "compiled": (
        "bf16, torch.compile, reduce-overhead",
        {"apply": recipes.stock_compile("reduce-overhead"), "compiled": True, "like": "compile", "anew": 1.0},
    ),
    "engine": ("bf16, our engine", {"apply": recipes.on_engine, "like": "compile"}),
}


def batches(device, steps):
    """Each way at each batch, the batches of a way in one process, the smallest first."""
    return [
        Shared(
            f"{way}_{batch}",
            f"{label}, batch {batch}",
            EAGER,
            pipeline=way,
            batch=batch,
            renewed=True,
            told={"way": way},
            **more,
        )
        for way, (label, more) in WAYS.items()
        for batch in BATCHES
    ]


def hpml(device, steps):
    """The rows of the HPML project's tables in their order: fp16, compiled with max-autotune, its own sampler Euler ancestral.

    `euler_30` is what `compiled` is, measured again, as in the project's tables. Source: "Stable Diffusion Inference
    Optimization on A100" by Deeptanshu and Yashdeep Prasad.
    """
    twenty = {"num_steps": min(20, steps)}
    fewer = {"dpm": {"scheduler": "dpm"} | twenty, "euler": twenty}
    # of a graph for the other sampler's timesteps most was searched already: it is as good as found
    unet, decoder, tiny, found = (AUTOTUNED * GRAPHS[part] for part in ("unet", "decoder", "tiny", "found"))

    def of(i, label, vae="compiled", **more):
        steps = (*EAGER, "tiny_vae") if vae == "tiny" else EAGER
        how = {} if vae == "eager" else {"apply": recipes.hpml, "compiled": True, "searches": True}
        return Shared(i, label, steps, {"dtype": torch.float16}, pipeline=vae, **how | more)

    return [
        of("baseline", "fp16, eager, Euler ancestral", vae="eager"),
        of("compiled", "UNet and VAE compiled", like="compile", anew=unet + decoder),
        of("compiled_tiny", "UNet and tiny VAE compiled", vae="tiny", like="tiny_vae", anew=tiny),
        of("euler_30", "compiled, full VAE: Euler ancestral again", like="compile"),
        of("euler_20", "Euler ancestral, 20 steps", like="compile", **fewer["euler"]),
        of("dpm_20_steps", "DPM++ 2M, 20 steps", like="compile", anew=found, **fewer["dpm"]),
        of("dpm_20_cutoff", "DPM++ 2M, 20 steps, cutoff", like="cfg_cutoff", anew=unet, stop=CUT, **fewer["dpm"]),
        of("euler_20_cutoff", "Euler ancestral, 20 steps, cutoff", like="cfg_cutoff", anew=found, stop=CUT, **fewer["euler"]),
        of("final", "DPM++ 2M, 20 steps, cutoff, tiny VAE", vae="tiny", like="cfg_cutoff", stop=CUT, **fewer["dpm"]),
    ]


def attribution(device, steps):
    """The path step upon step, and the whole path without each of them.

    The baseline is nothing to leave out. Without `sdpa` there is no `fused_qkv` either, whose projections attend by SDPA
    anyway: that row is compared with the path without `fused_qkv`. What would be the same pipeline is one row: each says in
    "upto" which steps it ends, {step: the row before}, and in "without" which it lacks, {step: the row that has it}.
    """
    idle = ("int8",) if quantization.gains_nowhere(device) else ()  # there, int8 rounds nothing
    rows = {}

    def row(kept, i, label):
        kept = tuple(step for step in kept if step not in idle)
        return rows.setdefault(kept, {"id": i, "label": label, "upto": {}, "without": {}})

    before = None
    for step in path.STEPS:
        here = row(NINE[: path.NUMBERS[step.id]], step.id, step.title)
        here["upto"][step.id], before = before, here["id"]
    for i in NINE[1:]:
        lacks = ("sdpa", "fused_qkv") if i == "sdpa" else (i,)
        here = row([i for i in NINE if i not in lacks], f"without_{i}", f"the whole path without {' and '.join(lacks)}")
        here["without"][i] = "without_fused_qkv" if i == "sdpa" else before
    return [_attributed(kept, told, steps) for kept, told in rows.items()]


def _attributed(kept, told, steps):
    i, modules = told["id"], tuple(step for step in kept if step not in CALLS)
    sampled = {key: value for call in CALLS if call in kept for key, value in sampling(call, steps).items()}
    return Shared(
        i,
        told["label"],
        modules,
        pipeline="+".join(modules),
        told={"steps": list(kept), "upto": told["upto"], "without": told["without"]},
        like=i if i in NINE else LIKE.get(i.removeprefix("without_"), "compile"),
        anew=_compiling(kept, i),
        **sampled,
    )


def _compiling(kept, i):
    """What a row compiles, of what UNet and decoder take: graphs that no row before it left on disk."""
    if "compile" not in kept:
        return 0.0
    unets = {"compile": 1, "fused_qkv": 1, "without_tiny_vae": 2, "without_dpm_20": 1}.get(i, 0)
    unets = 2 if i in ("without_fused_qkv", "without_sdpa", "without_bf16") else unets
    full = 0.0 if "tiny_vae" in kept or i == "without_tiny_vae" else GRAPHS["decoder"]
    return GRAPHS["unet"] * unets + full + GRAPHS["found"] * (i not in ("compile", "fused_qkv"))


ROWS = {"batches": batches, "hpml": hpml, "attribution": attribution}


def reckon(rows, recorded, shared):
    """Seconds each of `rows` may take, {id: seconds}, from a `recorded` path of the same model and size; else no entry.

    Time goes with the samples that the UNet sees, with the batch (which is the most it can be), and with what is compiled.
    """
    if not recorded or any(recorded["settings"][key] != shared[key] for key in ("height", "width")):
        return {}
    known = {row["id"]: row for row in recorded["rows"] if row["status"] == "ok"}
    compiling = known.get("compile", {}).get("first_call_s", 0.0)
    took, loaded = {}, set()
    for row in rows:
        if row.like in known:
            of = known[row.like]
            per_sample = of["latency_s"]["median"] / _samples(of["settings"], recorded["settings"])
            call = per_sample * row.samples(shared["steps"]) * (row.batch or shared["batch"])
            calls = row.runs(shared["runs"]) + 1.2  # a first call, and settling
            calls += timing.STAGE_CALLS * (call < drawing.LONG_S)
            took[row.id] = calls * call + row.anew * compiling
            took[row.id] += LOAD_S * (row.pipeline not in loaded)
            loaded.add(row.pipeline)
    return took


def _samples(own, shared):
    of = shared | own
    return guidance.samples(of["steps"], 0.0, of.get("cutoff", 1.0))
