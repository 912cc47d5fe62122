"""Draw the pictures of 09_cfg_cutoff's explorer: one prompt, one seed, steps by cutoff, as one sheet and a JSON.

python notebooks/explorer/make.py [--out FOLDER]      a minute on two CPU cores
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import logging
from PIL import Image

from sdopt import drawing, guidance, models, path, quality, results
from sdopt.pocket.captions import test_prompts
from sdopt.pocket.oracle import load_oracle

STEPS = (5, 10, 20, 30)  # downwards
CUTOFFS = (0.0, 0.2, 0.4, 0.6, 1.0)  # to the right
IDS = ("baseline_fp32", "sdpa", "dpm_20")  # fp32 and the full VAE: what differs is steps and cutoff alone
PROMPT, SEED = 1, 0  # the number of the test prompt; this one needs its guidance early


def make(out):
    """Write `out`/sheet.jpg and `out`/sheet.json; the same files at every run on one machine."""
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    model, subject = models.MODELS["pocket"], test_prompts(PROMPT + 1)[PROMPT]
    pipe, _ = path.prepare(models.load(model.name), IDS)
    pipe.set_progress_bar_config(disable=True)
    task = drawing.Task(model.height, model.width, model.steps, model.guidance_scale, ((subject.text,),), ((SEED,),))
    batches, pictures = [], {}
    pipe.unet.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))
    sheet = Image.new("RGB", (model.width * len(CUTOFFS), model.height * len(STEPS)))
    for row, steps in enumerate(STEPS):
        for column, cutoff in enumerate(CUTOFFS):
            batches.clear()
            call = {"num_inference_steps": steps} | guidance.cutoff(pipe, cutoff)
            picture = drawing.drawer(pipe, task, **call)()[0]
            print(f"{steps} steps, cutoff {cutoff:g}: {sum(batches)} UNet samples", flush=True)
            sheet.paste(picture, (column * model.width, row * model.height))
            pictures[steps, cutoff] = picture, sum(batches)
    Path(out).mkdir(parents=True, exist_ok=True)
    sheet.save(Path(out) / "sheet.jpg", quality=88)
    readings = load_oracle().read([picture for picture, _ in pictures.values()])
    seen = []
    for ((steps, cutoff), (picture, samples)), reading in zip(pictures.items(), readings, strict=True):
        agreement = subject.scene.compare(reading, subject.text)
        seen.append(
            {
                "steps": steps,
                "cutoff": cutoff,
                "unet_samples": samples,
                "objects": [sum(agreement.objects), len(agreement.objects)],
                "relations": [sum(agreement.relations), len(agreement.relations)],
                "read": [f"{t.size} {t.finish} {t.colour} {t.shape}" for t in reading.things],
                "against_guided": quality.drift(picture, pictures[steps, 1.0][0]),
            }
        )
    settings = {
        "model": model.name,
        "ids": IDS,
        "prompt": subject.text,
        "seed": SEED,
        "guidance_scale": model.guidance_scale,
        "side": model.width,
        "steps": STEPS,
        "cutoffs": CUTOFFS,
    }
    results.write_json(Path(out) / "sheet.json", {"settings": settings, "pictures": seen})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=Path(__file__).parent, help="the folder to write to; default: this file's")
    make(parser.parse_args().out)
