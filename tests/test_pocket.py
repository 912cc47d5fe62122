import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from sdopt import models
from sdopt.pocket import PIPELINE, WEIGHTS
from sdopt.pocket.captions import test_prompts as draw_prompts
from sdopt.pocket.oracle import load_oracle
from sdopt.quality import adherence

DATA = Path(__file__).parents[1] / "figures" / "data"
ALONE = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("a large red ball, by day", num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (64, 64) and not any(name.split(".")[0] == "sdopt" for name in sys.modules)
print({p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()})
"""


def draw(pipe, prompts, steps=30):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(
        [p.text for p in prompts],
        num_inference_steps=steps,
        guidance_scale=models.MODELS["pocket"].guidance_scale,
        generator=generators,
    ).images


def test_it_runs_with_diffusers_alone_in_fp32(tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE, str(PIPELINE)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{torch.float32}"


def test_what_is_shipped_is_small_and_safe():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*") if f.is_file()) <= 36 * 2**20
    assert max(f.stat().st_size for f in files) <= 16 * 2**20
    assert {f.suffix for f in files} == {".safetensors", ".json"}


def test_it_draws_what_prompts_say(pocket):
    prompts = draw_prompts(6)
    seen = adherence([p.scene.compare(r) for p, r in zip(prompts, load_oracle().read(draw(pocket, prompts)))])
    assert seen["objects"]["value"] >= 0.75 and seen["relations"]["value"] >= 0.5


def test_saved_and_loaded_again_it_draws_the_same(pocket, tmp_path):
    prompts = draw_prompts(1)
    before = draw(pocket, prompts, steps=2)[0]
    pocket.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert draw(again, prompts, steps=2)[0].tobytes() == before.tobytes()


def test_the_card_holds_what_the_model_must_do():
    bars = {
        "objects": 0.90, "objects_held_out": 0.80, "relations": 0.80, "vae_psnr_db": 30, "tiny_vae_psnr_db": 26,
        "oracle_objects": 0.99, "oracle_relations": 0.97, "vae_oracle_objects": 0.97,
    }  # fmt: skip
    card = json.loads((DATA / "nvidia-h200" / "pocket-card.json").read_text())
    for name, bar in bars.items():
        metric = card["metrics"][name]
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["value"] >= bar, name
    assert card["metrics"]["objects_shuffled"]["value"] < 0.2
    assert card["settings"]["prompts"] >= 2500
    assert card["settings"]["guidance_scale"] == models.MODELS["pocket"].guidance_scale
