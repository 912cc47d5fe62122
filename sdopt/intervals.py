"""95 % intervals by the bootstrap: what is in one prompt or picture stands or falls together and is resampled whole."""

from functools import lru_cache

import numpy as np

NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def share(clusters, resamples=1000, seed=0):
    """The mean over everything in `clusters` with a 95 % interval: {"value", "low", "high", "n"}.

    `clusters`: one tuple of bools or numbers a prompt or picture. What is in one cluster stands or falls together, so
    clusters are resampled whole (cluster bootstrap; Efron and Tibshirani 1993). The mean of nothing is None.
    """
    return ratio([sum(facts) for facts in clusters], [len(facts) for facts in clusters], resamples, seed)


def ratio(right, of, resamples=1000, seed=0):
    """`share` of clusters that were counted already: what is right in each, out of how many. Those of none do not count."""
    right, of = _counted(right, of)
    if not len(of):
        return dict(NOTHING)
    low, high = _bounds(right, of, resamples, seed)
    # Resampling a perfect score (or none) shows no doubt at all; there the exact binomial bound over prompts is used.
    if right.sum() == of.sum():
        low = 0.025 ** (1 / len(of))
    elif right.sum() == 0:
        high = 1 - 0.025 ** (1 / len(of))
    return _interval(right, of, low, high)


def difference(right, other, of, resamples=1000, seed=0):
    """How much larger a share is than another of the same prompts, paired: {"value", "low", "high", "n"}.

    `right` and `other` are counts out of `of`, a number a prompt each. A prompt is resampled with both of its counts, so
    that what the prompts have in common cancels. Where no prompt differs, the exact binomial bound on how many might
    stands on both sides. Shares, from -1 to 1. Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    gained, of = _counted(np.subtract(right, other, dtype=np.float64), of)
    if not len(of):
        return dict(NOTHING)
    low, high = _bounds(gained, of, resamples, seed)
    if not gained.any():
        high = 1 - 0.025 ** (1 / len(of))
        low = -high
    return _interval(gained, of, low, high)


def mean(values, resamples=1000, seed=0):
    """The mean of one number a prompt, with the interval that other prompts would move it in: as `share` has it.

    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    values, ones = _counted(values, np.ones(len(values)))
    return _interval(values, ones, *_bounds(values, ones, resamples, seed)) if len(ones) else dict(NOTHING)


@lru_cache(maxsize=4)
def resampled(n, resamples, seed):
    """How often each of `n` prompts is drawn in each resample: float64 [resamples, n], the same for all that is compared."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def _counted(right, of):
    right, of = np.asarray(right, np.float64), np.asarray(of, np.float64)
    return right[of > 0], of[of > 0]


def _bounds(right, of, resamples, seed):
    drawn = resampled(len(of), resamples, seed)
    return np.quantile((drawn @ right) / (drawn @ of), [0.025, 0.975])


def _interval(right, of, low, high):
    return {"value": float(right.sum() / of.sum()), "low": float(low), "high": float(high), "n": int(of.sum())}
