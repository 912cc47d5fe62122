from functools import cache

import pytest
import torch
from PIL import Image

from sdopt.errors import UserError
from sdopt.pocket import WEIGHTS
from sdopt.pocket import oracle as module
from sdopt.pocket.oracle import Oracle, load_oracle, to_pixels
from sdopt.pocket.renderer import render
from sdopt.pocket.scenes import sample
from sdopt.pocket.training.data import FIRST_HELD_OUT_RENDER
from sdopt.quality import adherence


@cache
def renders():
    scenes = [sample(FIRST_HELD_OUT_RENDER + seed) for seed in range(40)]
    return scenes, torch.cat([render([scene]) for scene in scenes])


def test_it_reads_renders_it_never_saw():
    scenes, images = renders()
    readings = load_oracle().read(images)
    seen = adherence([s.compare(r) for s, r in zip(scenes, readings)])
    assert seen["objects"]["value"] >= 0.98 and seen["relations"]["value"] >= 0.96
    assert sum(r.sky == s.sky for s, r in zip(scenes, readings)) >= 39


def test_against_other_prompts_it_agrees_with_almost_nothing():
    scenes, images = renders()
    readings = load_oracle().read(images)
    control = adherence([s.compare(r) for s, r in zip(scenes[1:] + scenes[:1], readings)])
    assert control["objects"]["value"] < 0.2 and control["relations"]["value"] < 0.1


def test_it_finds_nothing_where_nothing_is():
    grey = Image.new("RGB", (256, 256), (120, 120, 120))
    assert load_oracle().read([grey])[0].things == ()


def test_pictures_and_tensors_read_alike_and_other_sizes_are_scaled():
    scenes, images = renders()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:4]]
    assert torch.equal(to_pixels(pictures), images[:4])
    assert load_oracle().read(pictures) == load_oracle().read(images[:4])
    large = [p.resize((512, 512), Image.Resampling.BICUBIC) for p in pictures]
    pairs = [[t.pair for t in r.things] for r in load_oracle().read(large)]
    assert [set(p) for p in pairs] == [{t.pair for t in s.things} for s in scenes[:4]]


def test_it_is_small():
    assert (WEIGHTS / "oracle.safetensors").stat().st_size <= 4 * 2**20


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(damage, tmp_path, monkeypatch):
    if damage == "truncated":
        (tmp_path / "oracle.safetensors").write_bytes((WEIGHTS / "oracle.safetensors").read_bytes()[:5000])
    monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    load_oracle.cache_clear()
    with pytest.raises(UserError, match="cannot load the oracle from .*oracle.safetensors"):
        load_oracle()
    load_oracle.cache_clear()


def test_an_untrained_oracle_is_no_oracle():
    scenes, images = renders()
    torch.manual_seed(0)
    seen = adherence([s.compare(r) for s, r in zip(scenes[:8], Oracle().eval().read(images[:8]))])
    assert seen["objects"]["value"] < 0.2
