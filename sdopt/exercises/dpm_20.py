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
    spread, start, end = 0.2, 14.6, 0.03
    errors, asked = [], []

    def denoised(x, sigma):
        asked.append(sigma)
        return spread**2 * x / (spread**2 + sigma**2)

    for steps in (40, 80):
        asked.clear()
        sigmas = [start * (end / start) ** (i / steps) for i in range(steps + 1)]
        found = answer(denoised, 10.0, sigmas)
        errors.append(abs(float(found) - 10.0 * math.sqrt((spread**2 + end**2) / (spread**2 + start**2))))
    if errors[1] > 0.05:
        return f"with 80 steps the toy's end is off by {errors[1]:.3g}: does every step go from one sigma to the next?"
    order = math.log2(errors[0] / max(errors[1], 1e-300))
    if not 1.7 < order < 2.4:
        return f"twice the steps divide the error by {2**order:.1f}, order {order:.1f}: take the mean of both slopes"
    if len(asked) != 2 * steps:
        return f"80 steps asked the model {len(asked)} times: Heun's method asks twice a step, and remembers nothing"
    return None


EXERCISES = {"08.1": _to_v, "08.2": _heun}
