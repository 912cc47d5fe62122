"""The contact sheets of the model card: what the world looks like, and what pocket makes of prompts."""

import io
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from sdopt.pocket.captions import test_prompts
from sdopt.pocket.renderer import render
from sdopt.pocket.scenes import Agreement
from sdopt.pocket.training.data import FIRST_HELD_OUT_RENDER, draw_scenes
from sdopt.pocket.training.evaluate import draw, judge, load
from sdopt.results import write_whole

ROWS, COLUMNS = 4, 4


def contact_sheet(images: Tensor, texts: list[str], title: str, path: Path) -> None:
    """Draw uint8 pictures [16, 3, H, W] in a grid with a few lines of text under each."""
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(3 * COLUMNS, 3.75 * ROWS), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    for axis, image, text in zip(axes.flat, images, texts):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="lanczos")
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 42)]
        axis.set_title("\n".join(lines), y=0, pad=-8, va="top", fontsize=8.5)
        axis.axis("off")
    figure.suptitle(title, fontsize=12)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="jpeg", dpi=80, pil_kwargs={"quality": 85, "optimize": True})  # as a PNG four times as large
    write_whole(path, drawn.getvalue())
    plt.close(figure)


def _verdict(agreement: Agreement) -> str:
    parts = [f"{sum(agreement.objects)} of {len(agreement.objects)} objects"]
    if agreement.relations:
        parts.append(f"{sum(agreement.relations)} of {len(agreement.relations)} relations")
    return f"oracle: {', '.join(parts)}"


def draw_sheets(weights: Path, figures: Path, guidance: float, device: str) -> None:
    """Write pocket-world.jpg and pocket-samples.jpg; the samples are the first 16 test prompts with seeds 0 to 15."""
    scenes = draw_scenes(ROWS * COLUMNS, first=FIRST_HELD_OUT_RENDER)
    contact_sheet(
        render(scenes, device=device),
        [s.caption() for s in scenes],
        "pocket's world: renders and their captions",
        figures / "pocket-world.jpg",
    )
    pipe, _, oracle = load(weights, device)
    asked = test_prompts(ROWS * COLUMNS)
    images = draw(pipe, asked, guidance, "samples")
    verdicts = [_verdict(a) for a in judge(asked, oracle.read(images))]
    texts = [f"{p.text}\n{v}" for p, v in zip(asked, verdicts)]
    title = f"pocket: the first 16 test prompts, seeds 0 to 15, 30 steps, guidance {guidance}"
    contact_sheet(images, texts, title, figures / "pocket-samples.jpg")
