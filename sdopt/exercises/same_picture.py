"""Exercises of notebooks/14_is_it_still_the_same_picture."""

import numpy as np
import torch

from sdopt import intervals
from sdopt.exercises import number


def _psnr(answer):
    if not callable(answer):
        return f"give a function of (images, reference), not a {type(answer).__name__}"
    random = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (4, 3, 16, 24), generator=random).to(torch.uint8)
    images = torch.randint(0, 256, (4, 3, 16, 24), generator=random).to(torch.uint8)
    images[1] = reference[1].clamp(max=250) + 3
    images[3] = reference[3]
    given = answer(images.clone(), reference.clone())
    if not isinstance(given, torch.Tensor) or given.shape != (4,):
        return f"return a tensor [4], one number a picture, not {_shape(given)}"
    squared = (images[:3].double() - reference[:3].double()).square().mean((1, 2, 3))
    right = 10 * torch.log10(255**2 / squared)
    if not torch.isposinf(given[3]):
        return f"the last picture is its reference: infinite, and yours is {given[3]:g}"
    off = (given[:3].double() - right).abs()
    if not off.max() < 1e-3:
        worst = int(off.nan_to_num(torch.inf).argmax())
        return (
            f"picture {worst} is at {right[worst]:.3f} dB, yours says {given[worst]:.3f}: uint8 minus uint8 wraps around, "
            "and the peak is 255"
        )
    return None


def _shape(given):
    return str(list(given.shape)) if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"


def _interval(answer):
    if not callable(answer):
        return f"give a function of (right, other, of), not a {type(answer).__name__}"
    random = np.random.default_rng(3)
    of = random.integers(1, 9, 40)
    hard = random.random(40) < 0.5  # a prompt is hard for both ways, and then everything in it is lost
    other = np.where(hard, 0, of)
    lost, gained = random.random(40) < 0.5, random.random(40) < 0.2
    right = np.where(gained & (of < 4), of, np.where(lost & (of > 4), other // 3, other))  # shares are not means of shares
    given = answer(right.tolist(), other.tolist(), of.tolist())
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        return f"return two numbers, (low, high), not {_shape(given)}"
    expected = intervals.difference(right, other, of, resamples=20_000)
    off, width = max(abs(low - expected["low"]), abs(high - expected["high"])), expected["high"] - expected["low"]
    if off < 0.07 * width:
        return None
    hint = "give the bounds of the mean itself, in shares: 2.5 % and 97.5 %"
    if high - low > 1.3 * width:
        hint = "too wide: does each resample draw the same prompts for both ways?"
    elif high - low < 0.95 * width:
        hint = "too narrow: are whole prompts drawn, with all their objects, and cut at 2.5 % and 97.5 %?"
    near = f"{expected['low']:+.3f} to {expected['high']:+.3f}"
    return f"{low:+.3f} to {high:+.3f}, and it should be near {near}; {hint}"


def _unbiased(answer):
    return number(
        answer, 1.599, 1.601,
        "with d the distance and b the bias at 50: d + b = 3.0, and halves have twice the bias: d + 2 b = 4.4",
    )  # fmt: skip


EXERCISES = {"14.1": _psnr, "14.2": _interval, "14.3": _unbiased}
