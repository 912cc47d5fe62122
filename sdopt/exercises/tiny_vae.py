"""Exercises of notebooks/07_tiny_vae."""

import torch
from diffusers import AutoencoderTiny

from sdopt import models
from sdopt.exercises import number
from sdopt.pocket import PIPELINE


def _decode(answer):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tiny = AutoencoderTiny.from_pretrained(PIPELINE / "tiny_vae", use_safetensors=True)
    for name, vae in (("full", models.load("pocket").vae), ("tiny", tiny)):
        with torch.no_grad():
            right, pixels = vae.decode(latents / vae.config.scaling_factor).sample, answer(vae, latents)
        if not isinstance(pixels, torch.Tensor):
            return f"return the pixels, not a {type(pixels).__name__}: what decode returns has them as .sample"
        if pixels.shape != right.shape:
            return f"the {name} VAE's pixels should be of shape {list(right.shape)}, yours are {list(pixels.shape)}"
        if not torch.allclose(pixels, right, atol=1e-3):
            return (
                f"right shape, wrong pixels with the {name} VAE, whose config.scaling_factor is "
                f"{vae.config.scaling_factor:.4g}: which latents does it expect?"
            )
    return None


def _speedup(answer):
    for share, factor in ((0.07, 4.0), (0.5, 2.0), (0.9, 3.0), (0.3, 1.0), (1.0, 5.0)):
        wrong = number(
            answer(share, factor), *(1 / (1 - share + share / factor) * (1 + side) for side in (-1e-3, 1e-3)),
            f"speedup({share}, {factor}) is not right: of a time of 1, how much stays as it was, and how much is left "
            "of the rest?",
        )  # fmt: skip
        if wrong:
            return wrong
    return None


EXERCISES = {"07.1": _decode, "07.2": _speedup}
