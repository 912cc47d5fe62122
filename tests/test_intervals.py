import numpy as np
import pytest

from sdopt import intervals


def test_a_ratio_is_the_share_of_the_same_clusters():
    clusters = [(True, False), (True,), (), (True, True, False)]
    assert intervals.ratio([1, 1, 0, 2], [2, 1, 0, 3]) == intervals.share(clusters)


def test_of_nothing_there_is_no_interval():
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert intervals.share([]) == intervals.ratio([0], [0]) == intervals.mean([]) == nothing
    assert intervals.difference([0], [0], [0]) == nothing


def test_a_mean_comes_with_the_textbook_interval():
    values = np.random.default_rng(0).normal(30, 2, 400)
    told = intervals.mean(values)
    assert told["value"] == pytest.approx(values.mean()) and told["n"] == 400
    half = 1.96 * values.std() / 20
    assert told["value"] - told["low"] == pytest.approx(half, rel=0.15)
    assert told["high"] - told["value"] == pytest.approx(half, rel=0.15)


def test_a_paired_difference_knows_what_the_prompts_share():
    rng = np.random.default_rng(1)
    of = np.full(500, 2)
    hard = rng.random(500) < 0.1
    other = np.where(hard, 0, 2)
    right = np.where(rng.random(500) < 0.02, 0, other)  # the same prompts fail, and a few more
    told = intervals.difference(right, other, of)
    assert told["value"] == pytest.approx((right.sum() - other.sum()) / 1000) and told["low"] < told["high"] < 0
    alone = intervals.ratio(right, of)
    assert told["high"] - told["low"] < 0.6 * (alone["high"] - alone["low"])


def test_where_no_prompt_differs_some_might():
    told = intervals.difference([2, 1, 0] * 10, [2, 1, 0] * 10, [2] * 30)
    assert told["value"] == 0 and told["high"] == -told["low"] == pytest.approx(1 - 0.025 ** (1 / 30))


def test_the_paired_interval_covers_the_true_difference_about_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        other = rng.random(200) < 0.9
        right = np.where(rng.random(200) < 0.1, rng.random(200) < 0.5, other)  # a tenth drawn anew: 0.86 on average
        told = intervals.difference(right, other, np.ones(200), resamples=300, seed=trial)
        covered += told["low"] <= -0.04 <= told["high"]
    assert 180 <= covered <= 199
