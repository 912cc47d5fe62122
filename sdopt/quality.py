"""Does it still look right? Drift between two pictures, and whether a picture shows what its prompt said."""

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from sdopt.errors import UserError
from sdopt.pocket.oracle import load_oracle, to_pixels


def drift(images, reference):
    """How far `images` are from `reference`: {"exact", "max_abs", "psnr_db"}.

    Both: one PIL image or a list of them, the same number and size. `max_abs` is in levels of 0 to 255; `psnr_db` is
    over all pixels together, in dB, and None when exact (it would be infinite). Raises UserError when shapes differ.
    Introduced in notebooks/02_bf16.
    """
    a, b = (to_pixels(x if isinstance(x, (list, tuple)) else [x]) for x in (images, reference))
    if a.shape != b.shape:
        raise UserError(f"cannot compare images of shape {list(a.shape)} with {list(b.shape)}: draw them alike")
    exact = bool(torch.equal(a, b))
    return {
        "exact": exact,
        "max_abs": int((a.int() - b.int()).abs().max()),
        "psnr_db": None if exact else peak_signal_noise_ratio(a.float(), b.float(), data_range=255.0).item(),
    }


def seen(scenes, images):
    """What the oracle finds in pocket's pictures of what their prompts asked for: `adherence` of all of them.

    `scenes`: (text, scene) a picture; `images`: PIL images, in the same order. Introduced in
    notebooks/00_measure_first.
    """
    readings = load_oracle().read(images)
    return adherence([scene.compare(r, text) for (text, scene), r in zip(scenes, readings, strict=True)])


def adherence(agreements, resamples=1000, seed=0):
    """What share of what the prompts said is in the pictures, with 95 % intervals.

    `agreements`: one a picture, each with `objects` and `relations`, tuples of bool (`scene.compare(reading)`).
    Returns {"objects", "relations", "prompts_all_right"}, each {"value", "low", "high", "n"}, shares from 0 to 1; n
    counts objects, relations, prompts; a share of nothing is None. Objects are counted one by one, but those of one
    prompt stand or fall together, so whole prompts are resampled (cluster bootstrap; Efron and Tibshirani 1993).
    Introduced in notebooks/00_measure_first.
    """
    everything = [agreement.objects + agreement.relations for agreement in agreements]
    return {
        "objects": share([agreement.objects for agreement in agreements], resamples, seed),
        "relations": share([agreement.relations for agreement in agreements], resamples, seed),
        "prompts_all_right": share([(all(facts),) for facts in everything if facts], resamples, seed),
    }


def share(clusters, resamples=1000, seed=0):
    """The mean over everything in `clusters` with a 95 % interval: {"value", "low", "high", "n"}.

    `clusters`: one tuple of bools or numbers a prompt or picture. What is in one cluster stands or falls together, so
    clusters are resampled whole (cluster bootstrap; Efron and Tibshirani 1993). The mean of nothing is None.
    """
    right = np.array([sum(facts) for facts in clusters if facts], dtype=np.float64)
    of = np.array([len(facts) for facts in clusters if facts], dtype=np.float64)
    if not len(of):
        return {"value": None, "low": None, "high": None, "n": 0}
    n = len(of)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile((drawn @ right) / (drawn @ of), [0.025, 0.975])
    # Resampling a perfect score (or none) shows no doubt at all; there the exact binomial bound over prompts is used.
    if right.sum() == of.sum():
        low = 0.025 ** (1 / n)
    elif right.sum() == 0:
        high = 1 - 0.025 ** (1 / n)
    return {"value": float(right.sum() / of.sum()), "low": float(low), "high": float(high), "n": int(of.sum())}
