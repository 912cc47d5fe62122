"""The oracle: a small network that reads a picture of pocket's world back into its facts.

It finds the things' centres on a 32 x 32 grid (as CenterNet does, Zhou et al. 2019, arXiv 1904.07850) and reads at each
centre what stands there and where in the world. Relations follow from the coordinates, by the scenes' own rule.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sdopt.errors import UserError
from sdopt.pocket import WEIGHTS
from sdopt.pocket.scenes import COLOURS, FINISHES, GROUNDS, SHAPES, SIZES, SKIES, Reading, Thing

SIZE = 256  # pixels of a picture's side
GRID = 32
NAMES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "finish": FINISHES}  # in the order of a Thing's fields
HEADS = {"heat": 1} | {head: len(names) for head, names in NAMES.items()} | {"place": 3}
THRESHOLD, MOST = 0.4, 6  # how sure of a thing; how many things a picture has at most


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


class Oracle(nn.Module):
    """Reads pictures of pocket's world: float [N, 3, 256, 256] from -1 to 1 in, logits on a 32 x 32 grid out.

    Introduced in notebooks/00_measure_first.ipynb.
    """

    def __init__(self):
        super().__init__()
        down = lambda a, b: nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.fine = nn.Sequential(
            down(3, 32), nn.GroupNorm(8, 32), nn.SiLU(), down(32, 64), Block(64), down(64, 96), Block(96), Block(96)
        )
        self.coarse = nn.Sequential(down(96, 128), Block(128), Block(128))
        self.up = nn.Conv2d(128, 96, 1)
        self.merge = nn.Sequential(Block(96), Block(96), nn.GroupNorm(8, 96), nn.SiLU())
        self.things = nn.Conv2d(96, sum(HEADS.values()), 1)
        self.setting = nn.Linear(128, len(SKIES) + len(GROUNDS))
        nn.init.constant_(self.things.bias[:1], -4.0)  # almost every cell is empty

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.fine(pictures)
        coarse = self.coarse(fine)
        merged = self.merge(fine + F.interpolate(self.up(coarse), scale_factor=2.0))
        out = dict(zip(HEADS, self.things(merged).split(list(HEADS.values()), dim=1)))
        out["sky"], out["ground"] = self.setting(coarse.mean((2, 3))).split([len(SKIES), len(GROUNDS)], dim=1)
        return out

    @torch.no_grad()
    def read(self, pictures: list[Image.Image] | torch.Tensor, batch: int = 64) -> list[Reading]:
        """Read pictures: PIL images, or uint8 [N, 3, H, W]; other sizes than 256 are scaled. One reading each."""
        readings = []
        for pixels in self._batches(pictures, batch):
            readings += _decode({name: logits.float() for name, logits in self(pixels).items()})
        return readings

    @torch.no_grad()
    def features(self, pictures: list[Image.Image] | torch.Tensor, batch: int = 64) -> torch.Tensor:
        """What the oracle reads the setting from, its deepest layer over the whole picture: float32 [N, 128].

        Pictures as for `read`. For a Frechet distance, in place of the Inception network's features.
        """
        batches = self._batches(pictures, batch)
        return torch.cat([self.coarse(self.fine(pixels)).mean((2, 3)).float() for pixels in batches])

    def _batches(self, pictures, batch):
        parameter = next(self.parameters())
        for start in range(0, len(pictures), batch):
            pixels = to_pixels(pictures[start : start + batch]).to(parameter.device)
            pixels = pixels.to(parameter.dtype) / 127.5 - 1
            if pixels.shape[-2:] != (SIZE, SIZE):
                pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
            yield pixels


def to_pixels(pictures: list[Image.Image] | torch.Tensor) -> torch.Tensor:
    """Pictures as one uint8 tensor [N, 3, H, W]; tensors pass through."""
    if isinstance(pictures, torch.Tensor):
        return pictures
    rows = []
    for picture in pictures:
        rgb = picture.convert("RGB")
        flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        rows.append(flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1))
    return torch.stack(rows)


def _decode(out: dict[str, torch.Tensor]) -> list[Reading]:
    """The readings of pictures from their logits: local maxima of the heat map, strongest first, MOST of them at most.

    All pictures at once, and only what is read goes to the CPU: thousands of pictures are read for every row of a study.
    """
    heat = out["heat"].sigmoid()
    peaks = (heat == F.max_pool2d(heat, 5, stride=1, padding=2)) & (heat > THRESHOLD)
    strength, cells = heat.where(peaks, 0.0).flatten(1).sort(dim=1, descending=True, stable=True)
    strength, cells = strength[:, :MOST], cells[:, None, :MOST]
    there = {head: out[head].flatten(2) for head in HEADS}  # [N, classes, cells]
    there = {head: maps.gather(2, cells.expand(-1, maps.shape[1], -1)) for head, maps in there.items()}
    said = {head: [[names[k] for k in one] for one in there[head].argmax(1).tolist()] for head, names in NAMES.items()}
    places, confidence = there["place"].transpose(1, 2).tolist(), strength.tolist()
    skies, grounds = out["sky"].argmax(1).tolist(), out["ground"].argmax(1).tolist()
    readings = []
    for i, sure in enumerate(confidence):
        sure = tuple(s for s in sure if s > 0)
        things = tuple(Thing(*(said[head][i][k] for head in NAMES), *places[i][k]) for k in range(len(sure)))
        readings.append(Reading(things, SKIES[skies[i]], GROUNDS[grounds[i]], sure))
    return readings


@cache
def load_oracle(weights: Path | None = None) -> Oracle:
    """The trained oracle, fp32, in evaluation mode; `weights`: another folder than the shipped one.

    Raises UserError where its weights are missing or damaged.
    """
    path = (weights or WEIGHTS) / "oracle.safetensors"
    oracle = Oracle()
    try:
        oracle.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"cannot load the oracle from {path} ({type(error).__name__}); restore it with `git checkout -- {path}`"
        ) from error
    return oracle.eval()
