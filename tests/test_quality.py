from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdopt.errors import UserError
from sdopt.quality import CEILING_DB, adherence, drift, frechet, paired, psnr_db


def grey(level, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def agreement(objects, relations=()):
    return SimpleNamespace(objects=tuple(objects), relations=tuple(relations))


def test_the_same_picture_is_exact():
    assert drift(grey(7), grey(7)) == {"exact": True, "max_abs": 0, "psnr_db": None}


def test_drift_is_the_textbook_psnr_over_all_pixels():
    seen = drift([grey(100), grey(0)], [grey(110), grey(0)])
    assert (seen["exact"], seen["max_abs"]) == (False, 10)
    assert seen["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 50), abs=1e-4)


def test_max_abs_does_not_wrap_around():
    assert drift(grey(0), grey(255))["max_abs"] == 255


def test_pictures_of_different_size_are_refused():
    with pytest.raises(UserError, match="draw them alike"):
        drift(grey(0), grey(0, (4, 4)))


def test_adherence_counts_objects_relations_and_whole_prompts():
    seen = adherence([agreement([True, True], [True]), agreement([True, False], [False]), agreement([True])])
    assert (seen["objects"]["value"], seen["objects"]["n"]) == (4 / 5, 5)
    assert (seen["relations"]["value"], seen["relations"]["n"]) == (1 / 2, 2)
    assert (seen["prompts_all_right"]["value"], seen["prompts_all_right"]["n"]) == (2 / 3, 3)


def test_nothing_to_count_is_no_share():
    assert adherence([agreement([True])])["relations"] == {"value": None, "low": None, "high": None, "n": 0}


def test_the_interval_covers_the_true_share_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        drawn = [agreement(rng.random(3) < p) for p in rng.choice([0.7, 0.9], 150)]
        share = adherence(drawn, resamples=300, seed=trial)["objects"]
        covered += share["low"] <= 0.8 <= share["high"]
    assert 180 <= covered <= 199


def test_objects_of_one_prompt_stand_or_fall_together():
    together = [agreement([n % 2 == 0] * 3) for n in range(100)]
    alone = [agreement([n % 2 == 0]) for n in range(300)]
    width = [s["high"] - s["low"] for s in (adherence(together)["objects"], adherence(alone)["objects"])]
    assert width[0] > 1.5 * width[1]


def test_a_perfect_score_of_a_few_prompts_is_not_certainty():
    share = adherence([agreement([True, True])] * 5)["objects"]
    assert (share["value"], share["high"]) == (1.0, 1.0)
    assert share["low"] == pytest.approx(0.025 ** (1 / 5))


def pictures(n, seed=0):
    return torch.randint(60, 200, (n, 3, 24, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_paired_drift_is_counted_picture_by_picture():
    images, latents = pictures(70), torch.randn(70, 4, 3, 3)
    other = images.clone()
    other[1] += 10
    other[69, :, 0, :12] += 50
    told = paired(other, -2 * latents, images, latents)
    assert all(len(values) == 70 for values in told.values())
    assert told["psnr_db"][0] == CEILING_DB and told["ssim"][0] == pytest.approx(1) and told["p99"][0] == 0
    assert told["psnr_db"][1] == pytest.approx(10 * np.log10(255**2 / 100), abs=1e-3) and told["p99"][1] == 10
    assert told["p99"][69] == 50, "2 % of the picture are off"
    assert told["psnr_db"][69] == pytest.approx(10 * np.log10(255**2 / (2500 / 48)), abs=1e-3)
    assert told["ssim"][1] > told["ssim"][69], "one level for all is hardly seen, half a line is"
    assert told["latent_cosine"] == pytest.approx([-1] * 70), "of any scale, of which only the direction counts"


def test_pictures_that_cannot_be_paired_are_refused():
    latents = torch.zeros(2, 4, 3, 3)
    for other in (pictures(3), pictures(2)[..., :10, :10]):
        with pytest.raises(UserError, match="draw them alike, 11 pixels or more"):
            paired(other, latents, pictures(2)[..., : other.shape[-2], : other.shape[-1]], latents)


def test_what_would_be_repeated_to_fit_is_refused():
    some, latents = pictures(3), torch.randn(3, 4, 2, 2)
    with pytest.raises(UserError, match="cannot compare images"):
        psnr_db(some, some[:1])
    with pytest.raises(UserError, match="cannot compare latents"):
        paired(some, latents, some, latents[:1])
    with pytest.raises(UserError, match="give one a picture"):
        paired(some, latents[:2], some, latents[:2])
    for nothing_or_several in ([], [grey(1), grey(1, (16, 8))]):
        with pytest.raises(UserError, match="of no size or of several"):
            drift(nothing_or_several, nothing_or_several)


def normal(n, seed, mean=0.0, spread=1.0):
    return mean + spread * torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    a, b = normal(40_000, 1), normal(40_000, 2, mean=0.5, spread=2.0)
    told = frechet(a, b, resamples=20)
    assert told["value"] == pytest.approx(6 * (0.25 + 1), rel=0.02), "6 dimensions: 0.5 apart, spreads 1 and 2"
    assert told["low"] < told["value"] < told["high"] and told["n"] == 40_000
    assert frechet(b[:500], b[:500], resamples=20)["value"] == pytest.approx(0, abs=1e-9)
    slow = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    by_hand = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * slow
    assert told["value"] == pytest.approx(by_hand.item(), rel=1e-9)


def test_the_bias_of_few_pictures_is_told():
    """The same distribution twice: all of the distance is for want of pictures."""
    told = [frechet(normal(100, seed), normal(100, seed + 1), resamples=20) for seed in range(0, 40, 2)]
    value, bias = (np.mean([t[key] for t in told]) for key in ("value", "bias"))
    assert value > 0.1 and bias == pytest.approx(value, rel=0.2)


def test_too_few_for_a_distance_are_refused():
    with pytest.raises(UserError, match="give 4 or more of each"):
        frechet(normal(3, 0), normal(3, 1))
