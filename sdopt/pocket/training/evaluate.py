"""Measures the finished pocket: how well it does what its prompts say, and how much its parts lose on the way."""

import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from tqdm import tqdm

from sdopt.pocket.captions import Prompt, prompts
from sdopt.pocket.oracle import Oracle, load_oracle
from sdopt.pocket.scenes import Agreement, Reading, Scene
from sdopt.pocket.training.data import FIRST_HELD_OUT_RENDER, draw_scenes, pictures
from sdopt.quality import adherence, psnr_db, share
from sdopt.timing import latency, measure

STEPS = 30
GUIDANCES = (2.0, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0)
FIRST_SWEEP_NOISE = 1_000_000  # the sweep starts from latents of its own, too
BATCH = 128


def load(weights: Path, device):
    """The pipeline in fp32, the tiny VAE and the oracle."""
    pipe = DiffusionPipeline.from_pretrained(weights / "pipeline").to(device)
    pipe.set_progress_bar_config(disable=True)
    tiny = AutoencoderTiny.from_pretrained(weights / "pipeline" / "tiny_vae").to(device).eval()
    return pipe, tiny, load_oracle(weights).to(device)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Decoded pictures from -1 to 1 as uint8, as a pipeline rounds them."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def judge(asked: list[Scene] | list[Prompt], readings: list[Reading]) -> list[Agreement]:
    """Every picture against the scene it shows, or the prompt it was drawn from."""
    return [
        a.scene.compare(reading, a.text) if isinstance(a, Prompt) else a.compare(reading)
        for a, reading in zip(asked, readings)
    ]


def faultless(agreement: Agreement) -> bool:
    """Every object and relation of the prompt, and no other object."""
    return agreement.exact and all(agreement.relations)


def judge_shuffled(asked: list[Scene] | list[Prompt], readings: list[Reading]) -> list[Agreement]:
    """The control: every picture against what the next one was to show."""
    return judge(asked[1:] + asked[:1], readings)


@torch.no_grad()
def measure_parts(vae, tiny, oracle: Oracle, device, n: int) -> dict:
    """The VAE, the tiny VAE and the oracle on `n` renders that none of them was trained on."""
    scenes = draw_scenes(n, first=FIRST_HELD_OUT_RENDER)
    images = pictures(scenes, device)
    full, small = [], []
    for chunk in tqdm(images.split(BATCH), desc="autoencoders"):
        latents = vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()
        full.append(to_bytes(vae.decode(latents).sample))
        small.append(to_bytes(tiny.decode(latents * vae.config.scaling_factor).sample))
    full, small = torch.cat(full), torch.cat(small)
    readings = oracle.read(images)
    read, shuffled = judge(scenes, readings), judge_shuffled(scenes, readings)
    redrawn, tiny_redrawn = (judge(scenes, oracle.read(x)) for x in (full, small))
    return {
        "oracle_objects": adherence(read)["objects"],
        "oracle_relations": adherence(read)["relations"],
        "oracle_finish": share([a.finishes for a in read]),
        "oracle_sky": share([a.sky for a in read]),
        "oracle_exact": share([(a.exact,) for a in read]),
        "oracle_objects_shuffled": adherence(shuffled)["objects"],
        "oracle_relations_shuffled": adherence(shuffled)["relations"],
        "vae_psnr_db": share([(db,) for db in psnr_db(full, images).tolist()]),
        "vae_oracle_objects": adherence(redrawn)["objects"],
        "tiny_vae_psnr_db": share([(db,) for db in psnr_db(small, full).tolist()]),
        "tiny_vae_oracle_objects": adherence(tiny_redrawn)["objects"],
    }


@torch.no_grad()
def draw(pipe, asked: list[Prompt], guidance: float, what: str, seed: int = 0) -> torch.Tensor:
    """One picture a prompt, uint8 [N, 3, 256, 256]; prompt i starts from the latents of CPU seed `seed` + i."""
    images = []
    for start in tqdm(range(0, len(asked), BATCH), desc=what):
        rows = asked[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(rows))]
        out = pipe(
            [p.text for p in rows],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        images.append((out * 255).round().to(torch.uint8))
    return torch.cat(images)


def measure_prompts(pipe, oracle: Oracle, guidance: float, n: int) -> dict:
    """Adherence on prompts never trained on: of pairs that training showed, and of scenes with a pair it never did."""
    seen, unseen = prompts(n, "test"), prompts(n, "test", held_out=True)
    read = judge(seen, oracle.read(draw(pipe, seen, guidance, "prompts")))
    readings = oracle.read(draw(pipe, unseen, guidance, "held-out pairs"))
    combined, shuffled = judge(unseen, readings), judge_shuffled(unseen, readings)
    return {
        **adherence(read),
        "objects_held_out": share([tuple(ok for ok, new in zip(a.objects, a.held_out) if new) for a in combined]),
        "relations_held_out": adherence(combined)["relations"],
        "finish": share([a.finishes for a in read]),
        "sky": share([a.sky for a in read]),
        "faultless": share([(faultless(a),) for a in read]),
        "faultless_held_out": share([(faultless(a),) for a in combined]),
        "objects_shuffled": adherence(shuffled)["objects"],
        "relations_shuffled": adherence(shuffled)["relations"],
    }


def sweep(pipe, oracle: Oracle, n: int) -> list[dict]:
    """What is right at each guidance scale, on prompts of the validation part."""
    asked = prompts(n, "validation")
    rows = []
    for guidance in GUIDANCES:
        images = draw(pipe, asked, guidance, f"guidance {guidance}", FIRST_SWEEP_NOISE)
        read = judge(asked, oracle.read(images))
        seen = adherence(read)
        rows.append({
            "guidance_scale": guidance, "objects": seen["objects"], "relations": seen["relations"],
            "faultless": share([(faultless(a),) for a in read]),
        })  # fmt: skip
    return rows


def recommended(rows: list[dict]) -> float:
    """The lowest guidance scale that draws as many faultless pictures as the best, within the best's interval.

    The lowest, because guidance pushes colours and edges further than any render's, which the oracle does not mind.
    """
    best = max(rows, key=lambda row: row["faultless"]["value"])
    return min(r["guidance_scale"] for r in rows if r["faultless"]["value"] >= best["faultless"]["low"])


def card(weights: Path, device: str, n: int, environment: dict) -> dict:
    """Everything the model card states. `n` prompts of each kind, `n` renders, half of `n` prompts a guidance of the sweep."""
    pipe, tiny, oracle = load(weights, device)
    started = time.perf_counter()
    metrics = measure_parts(pipe.vae, tiny, oracle, device, n)
    rows = sweep(pipe, oracle, max(1, n // 2))
    best = recommended(rows)
    metrics = {**measure_prompts(pipe, oracle, best, n), **metrics}
    return {
        "schema": 1, "study": "pocket-card", "environment": environment,
        "settings": {"steps": STEPS, "guidance_scale": best, "scheduler": "euler", "dtype": "float32, PyTorch's default TF32 (convolutions alone)", "prompts": n, "interval": "95 %, bootstrap over whole prompts"},
        "metrics": metrics, "guidance_sweep": rows, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def speed(weights: Path, runs: int, environment: dict) -> dict:
    """What pocket costs on this CPU: a guided UNet call, both decoders, the size of what is shipped."""
    pipe, tiny, _ = load(weights, "cpu")
    latents, words = (
        torch.randn(2, 4, 32, 32),
        torch.randn(2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim),
    )
    calls = {
        "unet_guided_call_s": lambda: pipe.unet(latents, 500, words),
        "vae_decode_s": lambda: pipe.vae.decode(latents[:1]),
        "tiny_vae_decode_s": lambda: tiny.decode(latents[:1]),
    }
    metrics = {}
    with torch.no_grad():
        for name, call in calls.items():
            metrics[name] = latency(measure(call, runs, "cpu").runs_s)
    metrics["tiny_vae_speedup"] = metrics["vae_decode_s"]["median"] / metrics["tiny_vae_decode_s"]["median"]
    size = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
    metrics["pipeline_mib"] = size(weights / "pipeline")
    metrics["oracle_mib"] = (weights / "oracle.safetensors").stat().st_size / 2**20
    settings = {"dtype": "float32", "threads": torch.get_num_threads(), "runs": runs}
    return {"schema": 1, "study": "pocket-speed", "environment": environment, "settings": settings, "metrics": metrics}
