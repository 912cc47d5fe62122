"""Training data: scenes drawn in parallel, rendered on the device, kept as tensors."""

from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from sdopt.pocket.captions import wording
from sdopt.pocket.oracle import GRID
from sdopt.pocket.renderer import render
from sdopt.pocket.scenes import COLOURS, FINISHES, GROUNDS, SHAPES, SIZES, SKIES, Scene, project, sample

FIRST_HELD_OUT_RENDER = 500_000_000  # scenes for measuring the VAEs and the oracle; training starts at 0
WORDINGS = 4


def _draw(job: tuple[int, bool | None]) -> Scene:
    return sample(*job)


def _write(scene: Scene) -> list[str]:
    """Different wordings of one scene, all in the training part."""
    return [wording(scene, "train", first=1000 * k) for k in range(WORDINGS)]


def in_parallel(function, jobs: list, what: str) -> list:
    """Map over all cores, in order, with a progress bar."""
    with get_context("spawn").Pool() as pool:
        return list(tqdm(pool.imap(function, jobs, chunksize=512), total=len(jobs), desc=what, unit="scene"))


def draw_scenes(n: int, first: int = 0, held_out: bool | None = None) -> list[Scene]:
    """The scenes of seeds `first` to `first + n`."""
    return in_parallel(_draw, [(seed, held_out) for seed in range(first, first + n)], "scenes")


def write_captions(scenes: list[Scene]) -> list[list[str]]:
    """`WORDINGS` captions a scene, none of them in the test or the validation part."""
    return in_parallel(_write, scenes, "captions")


def render_all(scenes: list[Scene], device, chunk: int = 128):
    """Yield uint8 pictures [chunk, 3, 256, 256], in order."""
    with tqdm(total=len(scenes), desc="render", unit="scene") as bar:
        for start in range(0, len(scenes), chunk):
            yield render(scenes[start : start + chunk], device=device)
            bar.update(len(scenes[start : start + chunk]))


def pictures(scenes: list[Scene], device, cache: Path | None = None) -> torch.Tensor:
    """All pictures of the scenes as uint8 [N, 3, 256, 256] on the device; `cache` keeps them in a file for the next stage."""
    if cache and cache.exists() and cache.stat().st_size == len(scenes) * 3 * 256 * 256:
        return (
            torch.from_file(str(cache), size=len(scenes) * 3 * 256 * 256, dtype=torch.uint8)
            .view(-1, 3, 256, 256)
            .to(device)
        )
    out = torch.empty(len(scenes), 3, 256, 256, dtype=torch.uint8, device=device)
    start = 0
    for chunk in render_all(scenes, device):
        out[start : start + len(chunk)] = chunk
        start += len(chunk)
    if cache:
        part = cache.with_suffix(".part")
        out.cpu().numpy().tofile(part)
        part.rename(cache)
    return out


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What the oracle should say: [N, 3] a property of the things (-1 where there is none), [N] of the setting.

    `cell` is the grid cell of a thing's centre, `place` [N, 3, 3] its x, y and z in world units.
    """
    n = len(scenes)
    out = {k: torch.full((n, 3), -1) for k in ("cell", "shape", "colour", "size", "finish")}
    out["place"] = torch.zeros(n, 3, 3)
    for b, scene in enumerate(scenes):
        for k, t in enumerate(scene.things):
            u, v, _ = project(*t.centre)
            out["cell"][b, k] = int((v + 1) / 2 * GRID) * GRID + int((u + 1) / 2 * GRID)
            out["shape"][b, k], out["colour"][b, k] = SHAPES.index(t.shape), COLOURS.index(t.colour)
            out["size"][b, k], out["finish"][b, k] = SIZES.index(t.size), FINISHES.index(t.finish)
            out["place"][b, k] = torch.tensor([t.x, t.y, t.z])
    out["sky"] = torch.tensor([SKIES.index(s.sky) for s in scenes])
    out["ground"] = torch.tensor([GROUNDS.index(s.ground) for s in scenes])
    return out
