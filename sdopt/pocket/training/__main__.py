"""python -m sdopt.pocket.training STAGE: train pocket's parts, in the order vae, tiny-vae, oracle, text-to-image.

`card` and `speed` then measure what they can do and cost, for the model card; `pictures` draws its contact sheets.
"""

import argparse
import math
import os
from pathlib import Path

import torch

from sdopt.models import MODELS
from sdopt.pocket import WEIGHTS
from sdopt.pocket.training import evaluate, pictures, stages
from sdopt.results import environment, machine_name, write_json

# stage: (function, scenes, steps, batch, learning rate)
STAGES = {
    "vae": (stages.train_vae, 60_000, 4000, 64, 6e-4),
    "tiny-vae": (stages.train_tiny_vae, 60_000, 2000, 64, 1e-3),
    "oracle": (stages.train_oracle, 60_000, 3200, 128, 1e-3),
    "text-to-image": (stages.train_text_to_image, 180_000, 20_000, 256, 6e-4),
}


def finish(args) -> None:
    """The stages after training: measure, and draw."""
    if args.stage == "pictures":
        return pictures.draw_sheets(args.out, args.figures, MODELS["pocket"].guidance_scale, args.device)
    here = environment(args.device if args.stage == "card" else "cpu")
    result = (
        evaluate.card(args.out, args.device, args.prompts, here)
        if args.stage == "card"
        else evaluate.speed(args.out, 30, here)
    )
    write_json(args.figures / "data" / machine_name(here) / f"pocket-{args.stage}.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdopt.pocket.training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "card", "speed", "pictures"])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/pocket"),
        help="checkpoints, log and caches; a killed run goes on from here",
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where text-to-image puts the finished folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, help="how many scenes to train on")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="text-to-image: end the UNet's training after this long"
    )
    parser.add_argument(
        "--text-steps", type=int, default=2500, help="text-to-image: the text encoder's steps before the UNet's"
    )
    parser.add_argument(
        "--prompts", type=int, default=3000, help="card: how many prompts of each kind, and held-out renders"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        default=Path("figures"),
        help="pictures; card and speed: writes FIGURES/data/MACHINE/pocket-STAGE.json",
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.stage not in STAGES:
        return finish(args)
    train, *defaults = STAGES[args.stage]
    for name, default in zip(("scenes", "steps", "batch", "lr"), defaults):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if min(args.scenes, args.steps, args.batch) < 1:
        parser.error("--scenes, --steps and --batch take whole numbers from 1")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    train(args)


if __name__ == "__main__":
    main()
