"""Numbers that the input of a layer is not beyond, as they follow from the weights before it: the scales of what has one for all.

Of many layers at once: one by one they would be some forty short operations a layer, which take a GPU longer than the rounding
of all weights.
"""

import torch
from torch import nn

from sdopt.kernels import launch
from sdopt.kernels.gated_bound import gated_bound, reference
from sdopt.kernels.to_float8 import LARGEST, TINIEST

POSITIONS = 2**14  # of the latents of a picture of 1024 x 1024
SPARE = 1.25  # times what a product gives at most if its numbers are exact: (1 + 1/16) ** 2, and the sum's own rounding


def of_each(places: list[tuple[nn.Module | int, ...]]) -> list[torch.Tensor]:
    """For what comes after each of `places`, a number that nothing there is beyond: float32, [].

    A place: (a layer norm or group norm,), (a layer norm, the linear layer between it and GEGLU), or (a layer norm, a linear layer
    without a bias, the first of its outputs that are attention's values: their means are not beyond them). What is normalised has
    a norm of sqrt(n), in one number at most; for a group norm n is of an image of up to POSITIONS, and the bound holds for SiLU of
    it, too, and for a larger image unless one number in a group deviates by more than all the others together many times over.
    GEGLU's is kernels/gated_bound's, and so is that of values: a quarter larger a product, for it may be one of numbers in e4m3,
    each off by up to a sixteenth.
    """
    normed, others = ([n for n, place in enumerate(places) if (len(place) == 1) == alone] for alone in (True, False))
    found = dict(zip(normed, _of_norms([places[n][0] for n in normed])))
    found |= dict(zip(others, _of_products([places[n] for n in others])))
    return [found[n] for n in range(len(places))]


def of_norm(norm: nn.LayerNorm | nn.GroupNorm) -> torch.Tensor:
    """`of_each` of one norm. Introduced in notebooks/13_fp8."""
    return of_each([(norm,)])[0]


def of_all(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The largest absolute number of each."""
    return list(torch._foreach_norm(tensors, float("inf"))) if tensors else []


def of_values(v: torch.Tensor) -> torch.Tensor:
    """The scale of what attention gives: means of the values `v`, of which none is beyond the largest of them."""
    return scale_of(torch.linalg.vector_norm(v, float("inf")))


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """The one scale that numbers up to `largest` fit with, of each: float32."""
    return largest.float().clamp(min=TINIEST) / LARGEST


def _of_norms(norms):
    alike, found = {}, [None] * len(norms)
    for n, norm in enumerate(norms):
        alike.setdefault((len(norm.weight), _numbers(norm)), []).append(n)
    for (_, numbers), places in alike.items():
        weight, bias = (torch.stack([getattr(norms[n], name) for n in places]).float().abs() for name in ("weight", "bias"))
        for n, bound in zip(places, (weight * numbers**0.5 + bias).amax(1)):
            found[n] = bound
    return found


def _numbers(norm):
    """How many numbers it normalises together, at the most."""
    return norm.num_channels // norm.num_groups * POSITIONS if isinstance(norm, nn.GroupNorm) else len(norm.weight)


def _of_products(places):
    parts = []
    for norm, layer, *first in places:
        weight = layer.weight[first[0] :] if first else layer.weight
        here = weight.is_cuda and weight.dtype in launch.FLOATS and weight.is_contiguous()  # interpreted it takes seconds
        parts.append((gated_bound if here else _by_pytorch)(weight, layer.bias, norm.weight, norm.bias, not first))
    return torch._foreach_mul(of_all(parts), [SPARE if len(place) == 3 else SPARE**2 for place in places]) if parts else []


def _by_pytorch(weight, bias, gamma, beta, gated):
    return reference(*(None if tensor is None else tensor.float() for tensor in (weight, bias, gamma, beta)), gated)
