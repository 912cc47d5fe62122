"""Exercises of notebooks/13_fp8."""

import torch

from sdopt.exercises import number

E4M3 = torch.float8_e4m3fn


def _quantise(answer):
    if not callable(answer):
        return f"give a function of x, not a {type(answer).__name__}"
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1, 3] = 1e5  # an outlier
    x[2] *= 1e-20
    x[3] *= 1e25
    x[4] = 0
    x[5] = 3 * 2.0 ** -torch.arange(0, 16, 0.25)  # of every size down to where powers of two end, and a bit
    q, scale = answer(x.clone())
    if q.dtype != E4M3 or q.shape != x.shape:
        return f"q should be float8_e4m3fn {list(x.shape)}, yours is {str(q.dtype)[6:]} {list(q.shape)}"
    if scale.shape != (6, 1) or scale.dtype != torch.float32:
        return f"scale should be float32 [6, 1], one a row, yours is {str(scale.dtype)[6:]} {list(scale.shape)}"
    back = q.double() * scale.double()
    if not back.isfinite().all() or (back[4] != 0).any():
        return "something is not finite, or a row of zeros does not come back as zeros: what is its scale?"
    # half of 1/8 of a number's power of two; below the lowest power half of the even distance there
    may = torch.maximum(x.abs().double() / 16, x.abs().amax(1, keepdim=True).double() / 448 * 2.0**-10) * 1.001
    over = (back - x.double()).abs() > may
    if over.any():
        row = int(over.any(1).nonzero()[0])
        most = ((back - x.double()).abs() / may)[row].max()
        return f"row {row} comes back wrong by {most:.1f} times what e4m3 needs to be: does its largest number go to 448?"
    return None


def _smallest(answer):
    return number(answer, 0.0034, 0.0036, "the scale takes 100 to 448: where does it take a number to, so that it is 2**-6?")


def _saved(answer):
    return number(
        answer, 39.9, 40.1,
        "count bytes for each number: what the two write and read one after another, and what the layer norm writes alone",
        "MiB",
    )  # fmt: skip


EXERCISES = {"13.1": _quantise, "13.2": _smallest, "13.3": _saved}
