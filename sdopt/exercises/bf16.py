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
    for dtype in (torch.bfloat16, torch.float16):
        pipe = models.load("pocket")
        before = [p.clone() for p in pipe.vae.parameters()]
        if answer(pipe, dtype) is not pipe:
            return "return the pipe that came in"
        if pipe.vae.dtype != torch.float32:
            return f"the VAE is {pipe.vae.dtype}, it should stay torch.float32"
        if not all(map(torch.equal, before, pipe.vae.parameters())):
            return "the VAE was rounded on the way: its digits do not come back with its dtype, so leave it alone"
        wrong = [name for name in ("unet", "text_encoder") if getattr(pipe, name).dtype != dtype]
        if wrong:
            return f"asked for {dtype}, {wrong[0]} is {getattr(pipe, wrong[0]).dtype}"
    return None


EXERCISES = {"02.1": _largest, "02.2": _cast}
