"""Result files of the studies whose rows share pipelines, with made-up numbers: batches, the HPML project's rows, attribution."""

from made_up import bench_result, row, seen

from sdopt.bench import grids, studies

A_CALL = {"eager": (0.7, 0.42), "compiled": (0.02, 0.24), "engine": (0.01, 0.22)}  # seconds: of a call, and of a picture
GAINS = {"bf16": 2.0, "sdpa": 1.25, "compile": 2.0, "fused_qkv": 1.01, "int8": 1.0, "tiny_vae": 1.05}
GAINS |= {"dpm_20": 1.5, "cfg_cutoff": 1.25}
HPML = (0.9, 0.4, 0.36, 0.401, 0.28, 0.281, 0.22, 0.221, 0.2)
FULL = "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 24.00 GiB. GPU 0 has a total capacity of 139.80 GiB"


def shared_result(name, seconds, device="cuda", **settings):
    """What `sdopt bench NAME` writes on a GPU: `seconds(row)` of each row of the study, None of one that failed."""
    study = studies.study(name)
    made = bench_result(model=study.model, weights=study.weights)
    made["settings"] |= studies.settings(study.model, study.weights, steps=study.steps, runs=study.runs) | settings
    made |= {"study": name, "rows": []}
    for n, recipe in enumerate(studies.rows_of(study, device, made["settings"]["steps"])):
        own = {"label": recipe.label, "settings": recipe.differs(made["settings"]), "quality": None} | recipe.told
        median = seconds(recipe)
        if median is None:
            made["rows"].append({"id": recipe.id, "status": FULL} | own)
            continue
        runs = [median * (1 + (k % 5 - 2 + (n + k) % 3 / 3) / 200) for k in range(recipe.runs(made["settings"]["runs"]))]
        runs = sorted(runs)
        latency = {"median": median, "p20": min(median, runs[len(runs) // 4]), "p80": max(median, runs[-2]), "runs": runs}
        more = {"latency_s": latency, "gpu": {"sm_clock_mhz": seen(1900)}, "took_s": {"timing": 20.0}}
        more |= {"graphs": {"compiled": 2, "found": 0}} if recipe.compiles else {}
        more["peak_memory_bytes"] = int((6 + 2.5 * (recipe.batch or 1)) * 2**30)
        made["rows"].append(row(recipe.id, median, **own | more))
    return made


def batches_result(name="sd15-batches"):
    """Eager at 24 does not fit."""

    def seconds(recipe):
        call, picture = A_CALL[recipe.pipeline]
        return None if recipe.id == "eager_24" else max(call, 0.1) + picture * recipe.batch

    return shared_result(name, seconds)


def hpml_result():
    times = dict(zip((recipe.id for recipe in grids.hpml("cuda", 30)), HPML, strict=True))
    made = shared_result("sd15-hpml", lambda recipe: times[recipe.id])
    for r, gib in zip(made["rows"], (3.0, 4.9, 2.4, 4.9, 4.9, 4.9, 5.2, 5.2, 2.6), strict=True):
        r["peak_memory_bytes"] = int(gib * 2**30)
    made["rows"][3] |= {"warm_from": "compiled"}
    return made


def attribution_result(device="cuda"):
    """Each step is worth its gain in any place, but sdpa half as much without the compiler."""

    def seconds(recipe):
        kept = recipe.told["steps"]
        slower = 1.1 if "sdpa" in kept and "compile" not in kept else 1.0
        whole = 1.0
        for step, gain in GAINS.items():
            whole /= gain if step in kept else 1.0
        return 9.0 * whole * slower

    return shared_result("sdxl-attribution", seconds, device)
