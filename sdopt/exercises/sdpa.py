"""Exercises of notebooks/03_sdpa."""

import torch

from sdopt.exercises import number


def _scores(answer):
    return number(
        answer, 1280, 1280,
        "batch * heads * tokens * tokens scores of 4 bytes each, over 2**20: half precision would take half of it",
        unit="MiB",
    )  # fmt: skip


def _merge(answer):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 12, 8, generator=generator) for _ in range(3))
    scores = 5 * q @ k.transpose(-1, -2)
    right = scores.softmax(-1) @ v
    for cut in (6, 3, 11):
        halves = [_partial(scores[..., part], v[..., part, :]) for part in (slice(0, cut), slice(cut, None))]
        for a, b in (halves, halves[::-1]):
            merged = answer(a, b)
            if not isinstance(merged, torch.Tensor) or merged.shape != right.shape:
                return f"return one tensor shaped like out, {list(right.shape)} here"
            if not torch.allclose(merged, right, rtol=0, atol=1e-4):
                return (
                    f"off by up to {(merged - right).abs().max():.3g}: rescale total and out of both to the larger of "
                    "the two maxima, then add, then divide"
                )
    large = [_partial(scores[..., part] * 40, v[..., part, :]) for part in (slice(0, 6), slice(6, None))]
    if not answer(*large).isfinite().all():
        return (
            "not finite for large scores: only ever take exp of a difference to the larger maximum, which is at most 0"
        )
    return None


def _partial(scores, v):
    best = scores.amax(-1, keepdim=True)
    weights = (scores - best).exp()
    return best, weights.sum(-1, keepdim=True), weights @ v


EXERCISES = {"03.1": _scores, "03.2": _merge}
