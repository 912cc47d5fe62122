"""Exercises of notebooks/02_bf16."""

import torch

from sdopt import models
from sdopt.exercises import number


def _largest(answer):
    return number(
        answer, 256, 256,
        "try torch.tensor(answer, dtype=torch.bfloat16) and its neighbours: the first whole number that comes back changed "
        "is one more than what is asked for",
    )  # fmt: skip


def _cast(answer):
    pipe = models.load("pocket")
    cast = answer(pipe, torch.bfloat16)
    if cast is not pipe:
        return "return the pipe that came in"
    if pipe.vae.dtype != torch.float32:
        return f"the VAE is {pipe.vae.dtype}, it should stay torch.float32"
    wrong = [name for name in ("unet", "text_encoder") if getattr(pipe, name).dtype != torch.bfloat16]
    return f"{wrong[0]} is still {getattr(pipe, wrong[0]).dtype}" if wrong else None


EXERCISES = {"02.1": _largest, "02.2": _cast}
