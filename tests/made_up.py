"""A result file of a path study with made-up numbers, and pictures to go with it."""

from PIL import Image

from sdopt import results

IDS = ("baseline_fp32", "bf16", "sdpa", "compile", "fused_qkv", "int8", "tiny_vae", "dpm_20", "cfg_cutoff")
SECONDS = (4.0, 2.0, 1.96, 1.6, 1.6, 2.4, 1.5, 1.0, 0.8)


def share(right, of):
    return {"value": right / of, "low": 0.0, "high": 1.0, "n": of}


def row(i, seconds, **more):
    drift = {"exact": False, "max_abs": 9, "psnr_db": 31.5}
    return {
        "id": i,
        "label": i,
        "settings": {},
        "latency_s": {"median": seconds, "p20": seconds * 0.97, "p80": seconds * 1.03, "runs": [seconds] * 3},
        "first_call_s": seconds * 3,
        "peak_memory_bytes": 3 * 2**28,
        "stages_ms": {"text_encoder": 9, "unet": seconds * 850, "unet_calls": 30, "scheduler": 6, "vae": seconds * 90},
        "quality": {
            "objects": share(8, 10),
            "relations": share(3, 5),
            "prompts_all_right": share(2, 5),
            "against_baseline": None if i == IDS[0] else drift,
            "against_previous": None if i == IDS[0] else drift,
        },
        "as_run": {"compiled": "regional"},
        "status": "ok",
    } | more


def result(**settings):
    machine = dict.fromkeys(results.ENVIRONMENT) | {"cpu": "Some CPU, 2 cores", "torch": "2.13.0", "python": "3.11.7"}
    shared = {
        "model": "pocket",
        "weights": "shipped",
        "height": 256,
        "width": 256,
        "steps": 30,
        "guidance_scale": 3.0,
        "batch": 1,
        "scheduler": "euler",
        "seed": 0,
        "prompt": "a red sphere left of a blue cube",
        "runs": 3,
    }
    rows = [row(i, seconds) for i, seconds in zip(IDS, SECONDS, strict=True)]
    return {
        "schema": 1,
        "study": "pocket-path",
        "environment": machine,
        "settings": shared | settings,
        "rows": rows,
    }


def run_folder(folder, **settings):
    """What `sdopt run` leaves in a folder: the result file and one picture a step."""
    (folder / "pocket-path").mkdir(parents=True, exist_ok=True)
    results.write(folder / "pocket-path.json", result(**settings))
    for n, i in enumerate(IDS, 1):
        Image.new("RGB", (16, 16), (n * 25, 90, 200)).save(folder / "pocket-path" / f"{n}-{i}.png")
    return folder
