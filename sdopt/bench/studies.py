"""The studies by name, as data: which rows, of which model, and how they are measured."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sdopt import models, path, quantization, results
from sdopt.bench import grids, recipes, sweeps
from sdopt.bench.grids import EAGER, LOAD_S
from sdopt.bench.row import Recipe
from sdopt.bench.sweeps import NINE
from sdopt.errors import UserError
from sdopt.pocket.captions import test_prompts

NEEDED_BYTES = 64 * 2**20
GATE_STEPS = 5
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Study:
    """`kind` "path": each row in a fresh process; "peers": all rows side by side, a picture each in turn; "quality": rows
    that share a pipeline in one process, each timed and then judged by `pictures` of it; "shared": the same, timed alone;
    "stages": each row in a fresh process, each of its stages predicted before it is timed; "throughput": each row in a fresh
    process, with a batch of its own.
    """

    name: str
    kind: str
    model: str
    weights: str
    runs: int
    steps: int | None = None  # None: the model's own
    pictures: int | None = None
    guidance_scale: float | None = None


STUDIES = {
    study.name: study
    for study in (
        Study("pocket-path", "path", "pocket", "shipped", 5),
        Study("sd15-path", "path", "sd15", "random", 5),
        Study("sdxl-path", "path", "sdxl", "random", 5),
        Study("sd15-peers", "peers", "sd15", "random", 15),
        Study("sdxl-peers", "peers", "sdxl", "random", 9),
        Study("pocket-engine", "peers", "pocket", "shipped", 15),
        Study("sd15-engine", "peers", "sd15", "random", 15),
        Study("sdxl-engine", "peers", "sdxl", "random", 9),
        Study("pocket-stages", "stages", "pocket", "shipped", 5),
        Study("sd15-stages", "stages", "sd15", "random", 5),
        Study("sdxl-stages", "stages", "sdxl", "random", 5),
        Study("pocket-break-even", "peers", "pocket", "shipped", 9),
        Study("sd15-break-even", "peers", "sd15", "random", 9),
        Study("sdxl-break-even", "peers", "sdxl", "random", 9),
        Study("pocket-batches", "shared", "pocket", "shipped", 9),
        Study("sd15-batches", "shared", "sd15", "random", 9, steps=35),  # x-stable-diffusion's work
        Study("sdxl-batches", "shared", "sdxl", "random", 5),
        Study("sd15-hpml", "shared", "sd15", "random", 9),
        Study("pocket-attribution", "shared", "pocket", "shipped", 5),
        Study("sdxl-attribution", "shared", "sdxl", "random", 5),
        Study("pocket-quality", "quality", "pocket", "shipped", 9, pictures=2560),
        Study("sdxl-throughput", "throughput", "sdxl", "random", 3, steps=20, guidance_scale=8.0),  # MLPerf Inference's work
        Study("pocket-gate", "quality", "pocket", "shipped", 3, steps=GATE_STEPS, pictures=24),
    )
}


def study(name):
    """The `Study` called `name`; raises UserError for one there is none of."""
    if name not in STUDIES:
        raise UserError(f"unknown study '{name}': choose one of {', '.join(STUDIES)}")
    return STUDIES[name]


def settings(
    name, weights=None, height=None, width=None, steps=None, batch=1, runs=5, pictures=None, guidance_scale=None
):
    """The settings every row of a model shares: its own, with what is given instead. Raises UserError for bad ones.

    `pictures`: how many each row of a quality study draws to be judged, None for the other studies.
    """
    model = models.model(name)
    for option, value in (("steps", steps), ("batch", batch), ("runs", runs), ("pictures", pictures)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value} is too few: use 1 or more")
    height = model.height if height is None else height
    width = model.width if width is None else width
    models.check_size(height, width)
    return {
        "model": name,
        "weights": weights or model.weights,
        "height": height,
        "width": width,
        "steps": steps or model.steps,
        "guidance_scale": model.guidance_scale if guidance_scale is None else guidance_scale,
        "batch": batch,
        "scheduler": model.scheduler,
        "seed": 0,
        "prompt": test_prompts(1)[0].text if name == "pocket" else model.prompt,
        "runs": runs,
    } | ({"pictures": pictures} if pictures else {})


def nine(steps, cutoff=0.4):
    """The nine rows of a path, each with all steps up to its own."""
    options = {"cutoff": cutoff, "steps": steps}
    return [Recipe(step.id, step.title, NINE[: path.NUMBERS[step.id]], options) for step in path.STEPS]


def rows_of(study, device, steps):
    """All rows of a study, in the order they are measured."""
    if study.kind == "quality":
        return sweeps.gate_rows(steps) if study.name.endswith("-gate") else sweeps.rows(device, steps)
    if study.kind == "shared":
        return grids.ROWS[study.name.partition("-")[2]](device, steps)
    options = {"cutoff": 0.4, "steps": steps}
    whole = Recipe("whole_path_engine", "the whole path, on the engine", ON_ENGINE, options, apply=recipes.on_engine)
    if study.name.endswith("-engine"):
        return [nine(steps)[0], *PEERS, ENGINE, whole, *_fp8(study, device, options)]
    if study.name.endswith("-break-even"):
        return [*(row for row in PEERS if row.id in FIRST_CALLS), REGIONAL, ENGINE]
    if study.kind == "stages":
        return [*nine(steps), *((ENGINE, whole) if str(device).startswith("cuda") else ())]
    if study.kind == "throughput":
        return throughput(device)
    if study.kind == "peers":
        return list(PEERS)
    kept = path.worthwhile(device)
    without = [i for i in NINE if i not in kept]
    rows = [*nine(steps), *BASELINES]
    if without:
        rows.append(Recipe("recommended", f"the path without {' and '.join(without)}", kept, options))
    if quantization.gains_nowhere(device):
        anyway = {"int8_anyway": True}
        rows.append(
            Recipe("int8_anyway", "the whole path, in int8 though none gains", NINE, options | anyway, settings=anyway)
        )
    return rows


def _fp8(study, device, options):
    """The rows in fp8 of a study of the engine, where the GPU has it; of pocket, whose layers are small, in every layer."""
    if not quantization.has_fp8(device):
        return []
    layers = "all" if study.model == "pocket" else "measured"
    apply = recipes.in_fp8(layers)
    return [
        Recipe("torchao_fp8", "torchao's fp8, torch.compile, reduce-overhead", EAGER, apply=recipes.torchao_fp8, compiled=True),
        Recipe("engine_fp8", "fp8, our engine", EAGER, apply=apply),
        Recipe("engine_fp8_tensor", "fp8, our engine, a scale a tensor", EAGER, apply=recipes.in_fp8(layers, "tensor")),
        Recipe("whole_path_engine_fp8", "the whole path, on the engine in fp8", ON_ENGINE, options, apply=apply),
    ]


def throughput(device):
    """The rows of a throughput study: the engine at each of BATCHES, in bf16 and, where the GPU has it, in fp8."""
    kinds = {"bf16": {}} | ({"fp8": {"precision": "fp8"}} if quantization.has_fp8(device) else {})
    return [
        Recipe(
            f"{name}_batch_{batch}",
            f"{name}, {batch} at once",
            EAGER,
            apply=partial(recipes.many_at_once, **kind) if str(device).startswith("cuda") else None,
            settings={"batch": batch},
        )
        for name, kind in kinds.items()
        for batch in BATCHES
    ]


def chosen(rows, only):
    """The rows whose ids are in the text `only` ("bf16,sdpa"), None for all. Raises UserError for one there is none of."""
    if only is None:
        return rows
    known, wanted = [row.id for row in rows], only.split(",")
    unknown = [i for i in wanted if i not in known]
    if unknown:
        what = f"unknown row '{unknown[0]}'" if unknown[0] else "a row without a name"
        if ("_fp8" in unknown[0] or unknown[0].startswith("fp8_")) and not any("fp8" in i for i in known):
            what += " (rows in fp8 need a GPU of compute capability 8.9 or later)"
        raise UserError(f"{what}: choose from {', '.join(known)}")
    return [row for row in rows if row.id in wanted]


def check_room(out, shared):
    """Raise UserError unless `out` is a folder that can be written to, or made one, with room for a study."""
    out, needed = Path(out), NEEDED_BYTES + shared.get("pictures", 0) * 4 * shared["height"] * shared["width"]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder: give another with --out")
    results.write_whole(out / ".room", b"")
    (out / ".room").unlink()
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"only {free / 2**20:.0f} MiB are free for {out}: make room or give another folder with --out")


def estimate(rows, recorded, shared):
    """Seconds each of `rows` may take, {id: seconds}, from a recorded result of the same study; no entry for others.

    What was recorded with another size, number of steps or batch than `shared` says nothing.
    """
    sizes = ("height", "width", "steps", "batch", "pictures")
    alike = recorded and all(recorded["settings"].get(key) == shared.get(key) for key in sizes)
    took, runs = {}, shared["runs"]
    for row in recorded["rows"] if alike else ():
        if "took_s" in row:
            took[row["id"]] = sum(row["took_s"].values()) + ("load" in row["took_s"]) * LOAD_S
        elif row["status"] == "ok":
            calls = row.get("first_calls", {})
            first = sum(calls.get(key) or 0 for key in ("cold_s", "warm_s")) or row["first_call_s"]
            took[row["id"]] = (1 + (len(calls) > 0)) * LOAD_S + first + (runs + 3) * row["latency_s"]["median"]
    return {row.id: took[row.id] for row in rows if row.id in took}


# The path without what the engine does in its own way; int8 and fused projections have no place in its graphs.
ON_ENGINE = tuple(i for i in NINE if i not in ("compile", "fused_qkv", "int8"))
ENGINE = Recipe("engine_bf16", "bf16, our engine", EAGER, apply=recipes.on_engine)
BASELINES = [
    Recipe("baseline_tf32", "fp32, TF32 everywhere", NINE[:1], {"tf32": "everywhere"}, settings={"tf32": "everywhere"}),
    Recipe("baseline_strict", "fp32, TF32 nowhere", NINE[:1], {"tf32": "nowhere"}, settings={"tf32": "nowhere"}),
]
REGIONAL = Recipe("compile_regional", "bf16, diffusers' regional compilation", EAGER, apply=recipes.regional, compiled=True)
FIRST_CALLS = ("eager_bf16", "compile_reduce_overhead", "compile_max_autotune")  # peers whose first calls are weighed
PEERS = [
    Recipe("eager_fp16", "fp16, eager", EAGER, {"dtype": torch.float16}),
    Recipe("eager_bf16", "bf16, eager", EAGER),
    *(
        Recipe(
            f"compile_{mode.replace('-', '_')}",
            f"bf16, torch.compile, {mode}",
            EAGER,
            apply=recipes.stock_compile(mode),
            compiled=True,
            searches=mode == "max-autotune",
        )
        for mode in ("reduce-overhead", "max-autotune")
    ),
    Recipe(
        "tutorial_recipe",
        "diffusers' tutorial, the whole recipe",
        EAGER,
        apply=recipes.tutorial,
        compiled=True,
        searches=True,
    ),
    *(
        Recipe(f"sdpa_{backend}", f"bf16, eager, SDPA by {backend}", EAGER, {"attention": backend})
        for backend in ("math", "efficient", "flash", "cudnn")
    ),
    Recipe("xformers", "bf16, eager, attention by xformers", EAGER, apply=recipes.xformers),
]
