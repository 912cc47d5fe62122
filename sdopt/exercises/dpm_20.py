"""Exercises of notebooks/08_dpm_20."""

import math

import torch


def _to_v(answer):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in (0.1, 1.0, 9.0):
        v = answer(noise, clean + sigma * noise, sigma)
        right = (noise - sigma * clean) / math.sqrt(sigma**2 + 1)
        if not isinstance(v, torch.Tensor) or v.shape != right.shape:
            return "return a tensor of the shape of epsilon"
        if not torch.allclose(v.double(), right, atol=1e-6):
            return (
                f"at sigma {sigma:g} this v gives another D than epsilon does: write to_denoised for both, set them "
                "equal, and solve for v"
            )
    return None


def _heun(answer):
    spread, start, end, steps = 0.2, 14.6, 0.03, 80
    sigmas, asked = [start * (end / start) ** (i / steps) for i in range(steps + 1)], []

    def denoised(x, sigma):
        asked.append(sigma)
        return spread**2 * x / (spread**2 + sigma**2)

    right = _by_heun(denoised, 10.0, sigmas)
    twice, asked = asked, []
    found = float(answer(denoised, 10.0, sigmas))
    if len(asked) != len(twice):
        return f"80 steps asked the model {len(asked)} times: Heun's method asks twice a step, and remembers nothing"
    if not all(math.isclose(one, other) for one, other in zip(asked, twice, strict=True)):
        return "the model should be asked at both ends of every step: at the sigma it is at, then at the sigma it goes to"
    if not math.isclose(found, right, rel_tol=1e-6):
        exact = 10.0 * math.sqrt((spread**2 + end**2) / (spread**2 + start**2))
        return (
            f"80 steps on the toy end {found - exact:.3g} off the exact solution, Heun's {right - exact:.3g}: "
            "go from where the step began, with the mean of both slopes"
        )
    return None


def _by_heun(denoised, x, sigmas):
    for now, then in zip(sigmas, sigmas[1:]):
        here = (x - denoised(x, now)) / now
        there = x + here * (then - now)
        x = x + (here + (there - denoised(there, then)) / then) / 2 * (then - now)
    return x


EXERCISES = {"08.1": _to_v, "08.2": _heun}
