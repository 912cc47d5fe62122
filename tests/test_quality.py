from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdopt.errors import UserError
from sdopt.quality import adherence, drift


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
