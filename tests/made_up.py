"""Result files of path and peer studies with made-up numbers, pictures to go with them, and a study that is killed."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver

import pytest
from PIL import Image

from sdopt import results
from sdopt.bench import process

IDS = ("baseline_fp32", "bf16", "sdpa", "compile", "fused_qkv", "int8", "tiny_vae", "dpm_20", "cfg_cutoff")
SECONDS = (4.0, 2.0, 1.96, 1.6, 1.6, 2.4, 1.5, 1.0, 0.8)
PEERS = {  # id: label, seconds, and what the UNet's attention ran on
    "eager_fp16": ("fp16, eager", 2.1, "cudnn"),
    "eager_bf16": ("bf16, eager", 2.0, "cudnn"),
    "compile_reduce_overhead": ("bf16, torch.compile, reduce-overhead", 1.7, "cudnn"),
    "compile_max_autotune": ("bf16, torch.compile, max-autotune", 1.6, "cudnn"),
    "tutorial_recipe": ("diffusers' tutorial, the whole recipe", 1.75, "cudnn"),
    "sdpa_math": ("bf16, eager, SDPA by math", 4.0, "math"),
    "sdpa_efficient": ("bf16, eager, SDPA by efficient", 2.5, "efficient"),
    "sdpa_flash": ("bf16, eager, SDPA by flash", 2.2, "flash"),
    "sdpa_cudnn": ("bf16, eager, SDPA by cudnn", 2.0, "cudnn"),
}


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


def bench_result(**settings):
    """What `sdopt bench sdxl-path` writes on a GPU, with random weights."""
    made = result(**{"model": "sdxl", "weights": "random", "height": 1024, "width": 1024} | settings)
    made |= {
        "study": f"{made['settings']['model']}-path",
        "gpu_state": {"sm_clock_max_mhz": 1980, "power_limit_w": 700},
    }
    made["environment"]["gpu"] = "Some GPU"
    judged = made["settings"]["weights"] != "random"
    extras = [
        row("baseline_tf32", 3.0, label="fp32, TF32 everywhere", settings={"tf32": "everywhere"}),
        row("baseline_strict", 5.0, label="fp32, TF32 nowhere", settings={"tf32": "nowhere"}),
        row("recommended", 0.5, label="the path without int8"),
    ]
    for n, r in enumerate([*made["rows"], *extras]):
        plain = n < 2 or r in extras[:2]
        dtype = "float32" if n == 0 or r in extras[:2] else "bfloat16"
        r["quality"] = r["quality"] if judged else None
        r["gpu"] = {"sm_clock_mhz": seen(1700 + 10 * n), "power_w": seen(600 - n), "temperature_c": seen(50)}
        r["as_run"] = {"compiled": None, "unet_dtype": dtype, "vae_dtype": dtype}
        r["unet_kernels"] = [kernels(2, 10.0)]
        r["as_run"]["attention"] = ["math"] if plain else ["cudnn", "flash"] if n == 2 else ["cudnn"]
        if n > 2 and not plain:
            r["as_run"]["compiled"] = "whole"
            r["first_calls"] = {"cold_s": 210.0 + n, "compiled": 1, "found": int(n == 4), "warm_s": 12.0 + n}
            r["first_call_s"] = r["first_calls"]["cold_s"]
    last = made["rows"][-1]
    last["unet_kernels"] += [kernels(1, 6.0)]
    last["settings"] |= {"cutoff": 0.4, "steps": 20}
    last["stages_ms"] |= {"unet_calls": 20}
    made["rows"] += extras
    return made


def kernels(samples, ms):
    """What a profile says of a UNet call of `ms` milliseconds."""
    shares = {"attention": 0.1, "convolution": 0.2, "matrix product": 0.5, "other": 0.2}
    return {"samples": samples, "ms": {kind: share * ms for kind, share in shares.items()}}


def seen(median):
    return {"median": median, "low": median - 100, "high": median + 100}


def peers_result(**settings):
    """What `sdopt bench sdxl-peers` writes on a GPU where xformers' kernels cannot be loaded."""
    made = bench_result(**settings)
    made |= {"study": f"{made['settings']['model']}-peers", "gpu_while_timed": {"sm_clock_mhz": seen(1750)}}
    made["rows"] = []
    for i, (label, seconds, attention) in PEERS.items():
        runs = [seconds * (1 + k / 100) for k in (-2, -1, 0, 1, 2)]
        as_run = {"compiled": None, "unet_dtype": "bfloat16", "vae_dtype": "bfloat16", "attention": [attention]}
        if i == "eager_fp16":
            as_run |= {"unet_dtype": "float16", "vae_dtype": "float32"}
        latency = {"median": runs[2], "p20": runs[1], "p80": runs[3], "runs": runs}
        more = {
            "label": label,
            "quality": None,
            "latency_s": latency,
            "as_run": as_run,
            "unet_kernels": [kernels(2, 30.0)],
        }
        if "compile" in i or i == "tutorial_recipe":
            calls = {"cold_s": 100 * seconds, "compiled": 2, "found": 0, "warm_s": 10 * seconds}
            more |= {"first_calls": calls, "first_call_s": calls["cold_s"]}
        made["rows"].append(row(i, seconds, **more))
    failed = "failed: xformers cannot attend here (its kernels need libcudart.so.12); SDPA does"
    made["rows"].append({"id": "xformers", "label": "attention by xformers", "settings": {}, "status": failed})
    return made


def run_folder(folder, made=None, **settings):
    """What a study leaves in a folder: its result, `made` or a path's, and but of noise a picture a row."""
    made = made or result(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder / f"{made['study']}.json", made)
    if made["settings"]["weights"] != "random":
        for n, r in enumerate(made["rows"], 1):
            picture = folder / made["study"] / f"{min(n, 10)}-{r['id']}.png"
            picture.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (n * 20, 90, 200)).save(picture)
    return folder


def killed(study, writes, *arguments):
    """`study(*arguments)` in a process of its own, which is killed as it is about to write a result for the `writes`-th time."""
    with process.Worker(process.context("cpu")) as worker, pytest.raises(process.RowFailed, match="SIGKILL"):
        worker.call(_until_killed, forkserver._forkserver._forkserver_address, study, writes, arguments)


def _until_killed(state, tell, server, study, writes, arguments):
    write, count = results.write, []

    def write_or_die(path, result):
        count.append(path)
        if len(count) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(multiprocessing.process.current_process()._config, "daemon", False)  # so that it may have children
        # forked from the server that it came from itself: one of its own would take seconds to import torch
        patch.setattr(forkserver._forkserver, "_forkserver_address", server)
        patch.setattr(forkserver._forkserver, "ensure_running", lambda: None)
        patch.setattr("sdopt.bench.ledger.results.write", write_or_die)
        study(*arguments)


def stages_result(**settings):
    """What `sdopt bench sdxl-stages` writes on a GPU: the nine steps, and the engine alone."""
    made = bench_result(**settings)
    made |= {"study": f"{made['settings']['model']}-stages"}
    made["rows"] = [r | {"quality": None} for r in made["rows"] if r["id"] in IDS] + [row("engine_bf16", 0.9, quality=None)]
    for n, r in enumerate(made["rows"]):
        way, rates = ("eager", "fused")[n > 2], {"bfloat16": 700e12} if n else {"float32": 50e12, "TF32": 400e12}
        flops = {"bfloat16": 200e12} if n else {"float32": 75e12, "TF32": 100e12}
        unet = {"way": way, "operators": 90_000, "flops": flops, "bytes": 10**12, "predicted_ms": 600.0, "limit": "arithmetic"}
        unet["kinds"] = {"matrix product": {"flops": 60e12, "bytes": 10**11}, "other": {"flops": 0, "bytes": 10**11}}
        text = unet | {"way": "graph" if n == 9 else "eager", "flops": {max(rates): 10**11}, "limit": "launches"}
        stages = {"text_encoder": text | {"bytes": 10**9, "predicted_ms": 5.0}, "unet": unet}
        stages["scheduler"] = text | {"way": "eager", "flops": {}, "bytes": 10**7, "predicted_ms": 2.0}
        stages["vae"] = unet | {"flops": {max(rates): 10**13}, "bytes": 10**11, "predicted_ms": 40.0}
        ceilings = {"flops_per_s": rates, "bytes_per_s": 4e12, "launch_s": 4e-6}
        r["roofline"] = {"ceilings": ceilings, "call_ms": 1010 * r["latency_s"]["median"], "stages": stages}
    return made


def break_even_result(**settings):
    """What `sdopt bench sdxl-break-even` writes on a GPU."""
    made = peers_result(**settings)
    kept = ("eager_bf16", "compile_reduce_overhead", "compile_max_autotune")
    made |= {"study": f"{made['settings']['model']}-break-even"}
    made["rows"] = [r | {"prepare_s": 0.5} for r in made["rows"] if r["id"] in kept]
    calls = {"cold_s": 40.0, "compiled": 2, "found": 0, "warm_s": 8.0}
    made["rows"].append(row("compile_regional", 2.1, quality=None, prepare_s=0.5, first_calls=calls, first_call_s=40.0))
    made["rows"].append(row("engine_bf16", 1.0, quality=None, prepare_s=1.0, first_call_s=9.0))
    return made
