import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdopt.pocket.captions import split
from sdopt.pocket.oracle import GRID
from sdopt.pocket.scenes import project, sample
from sdopt.pocket.training import loop
from sdopt.pocket.training.data import targets, write_captions
from sdopt.pocket.training.text import UNSAID, facts


def train(work, steps=12, stop_after=None, **options):
    """Fit a linear map to a known one; `stop_after` kills the run at that step, after a checkpoint."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    calls = 0

    def draw(generator):
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise KeyboardInterrupt
        return (torch.randn(16, 4, generator=generator),)

    def loss(x):
        return (model(x).float() - x.sum(1, keepdim=True)).square().mean()

    loop.fit(
        "toy",
        nn.ModuleDict({"model": model}),
        draw,
        loss,
        steps=steps,
        batch=16,
        lr=0.1,
        work=work,
        ema=0.5,
        compiled=False,
        **options,
    )
    return model.weight.detach()


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "a")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stop_after=5)
    resumed = train(tmp_path / "b")
    assert torch.equal(whole, resumed)
    log = json.loads((tmp_path / "b" / "training.json").read_text())["stages"]["toy"]
    assert [p["step"] for p in log["points"]] == list(range(1, 13))


def test_training_learns_and_what_is_left_is_the_average(tmp_path):
    learned = train(tmp_path, steps=300)
    assert learned == pytest.approx(torch.ones(1, 4), abs=0.05)


def test_time_ends_a_run_as_steps_do(tmp_path):
    train(tmp_path, steps=10**7, minutes=0.01)
    assert 0 < int(load_file(tmp_path / "toy.safetensors")["step"]) < 10**7


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(SystemExit, match="lower --lr"):
        loop.fit(
            "bad",
            nn.ModuleDict({"m": model}),
            lambda g: (torch.full((2, 1), math.nan),),
            lambda x: model(x).mean(),
            steps=3,
            batch=2,
            lr=0.1,
            work=tmp_path,
            compiled=False,
        )


def test_targets_are_where_the_things_are_drawn():
    scenes = [sample(seed) for seed in range(20)]
    truth = targets(scenes)
    for b, scene in enumerate(scenes):
        assert (truth["cell"][b] >= 0).sum() == len(scene.things)
        for k, thing in enumerate(scene.things):
            u, v, _ = project(*thing.centre)
            row, column = divmod(int(truth["cell"][b, k]), GRID)
            assert (
                abs((column + 0.5) / GRID * 2 - 1 - u) <= 1 / GRID + 1e-6
                and abs((row + 0.5) / GRID * 2 - 1 - v) <= 1 / GRID + 1e-6
            )
            assert truth["place"][b, k].tolist() == pytest.approx([thing.x, thing.y, thing.z], abs=1e-6)


def test_training_captions_are_of_the_training_part():
    rows = write_captions([sample(seed, held_out=False) for seed in range(30)])
    assert all(split(text) == "train" for row in rows for text in row)
    assert all(len(set(row)) > 1 for row in rows)


def test_the_text_encoder_learns_relations_both_ways_round():
    scene = next(s for s in map(sample, range(100)) if len(s.things) == 2 and s.relations[0][1] == "left of")
    pair, both = facts(scene)
    a, _, b = scene.relations[0]
    assert sorted(both) == sorted([[pair[a], pair[b], 0], [pair[b], pair[a], 1]])
    three = next(s for s in map(sample, range(100)) if len(s.things) == 3)
    assert len(facts(three)[1]) == 6 and any(r == UNSAID for *_, r in facts(three)[1])
