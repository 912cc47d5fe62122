import copy

import numpy as np
import pytest
import torch
from tiny import draw, native, psnr
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from sdopt import models, precision
from sdopt.bench.row import as_run
from sdopt.errors import UserError
from sdopt.precision import full_precision, half_dtype, half_precision, set_tf32


@pytest.fixture(autouse=True)
def tf32_as_it_was():
    yield
    set_tf32("convolutions")


def dtypes(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {p.dtype for module in modules for p in module.parameters()}


@pytest.mark.parametrize(
    "policy, matmul, convolutions",
    [("convolutions", False, True), ("everywhere", True, True), ("nowhere", False, False)],
)
def test_tf32_is_allowed_where_the_policy_says(sdxl, policy, matmul, convolutions):
    full_precision(sdxl, policy)
    assert torch.backends.cuda.matmul.allow_tf32 is matmul
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert dtypes(sdxl) == {torch.float32}


def test_half_precision_takes_every_module_along_and_keeps_the_picture(pipe):
    before = draw(pipe, **native(pipe))
    half_precision(pipe)
    assert dtypes(pipe) == {torch.bfloat16}
    # bfloat16 keeps 8 bits, and the steps add up some of their rounding
    assert 40 < psnr(draw(pipe, **native(pipe)), before) < 80


def test_float16_draws_even_where_the_vae_must_be_upcast(sdxl):
    before = draw(sdxl)
    assert sdxl.vae.config.force_upcast
    half_precision(sdxl, torch.float16)
    for _ in range(2):  # the upcast of the first call must not leak into the second
        assert np.abs(draw(sdxl) - before).max() < 0.02
        assert dtypes(sdxl) == {torch.float16}


def test_half_precision_goes_back_to_full(sdxl):
    full_precision(half_precision(sdxl))
    assert dtypes(sdxl) == {torch.float32}


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_bfloat16_only_where_the_gpu_has_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_dtype("cuda") is dtype


@pytest.fixture
def without_instructions(monkeypatch):
    """A CPU without instructions for 16-bit floats; PyTorch is as it was afterwards."""
    for cls, name in ((nn.Conv2d, "_conv_forward"), (nn.Linear, "forward"), (torch, "bmm"), (torch, "baddbmm")):
        monkeypatch.setattr(cls, name, getattr(cls, name))
    monkeypatch.setattr(precision, "WIDE", set())
    monkeypatch.setattr(precision, "_has_instructions", lambda dtype: False)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, bias=False), nn.Linear(6, 8), nn.Linear(6, 8, bias=False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_instructions_layers_compute_in_float32_and_round(without_instructions, layer, dtype):
    x, layer = torch.randn(2, 4, 6, 6).to(dtype), copy.deepcopy(layer)
    wide = lambda: copy.deepcopy(layer.to(dtype)).float()(x.float())  # the same rounded weights
    expected, exact = wide().to(dtype), wide()
    precision.compute_wide("cpu")
    assert torch.equal(layer(x), expected) and torch.equal(copy.deepcopy(layer).float()(x.float()), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_instructions_attention_by_the_formula_computes_in_float32_and_rounds(without_instructions, dtype):
    q, k, mask = (torch.randn(2, *size).to(dtype) for size in ((5, 8), (8, 7), (5, 7)))
    exact = torch.bmm(q.float(), k.float()), torch.baddbmm(mask.float(), q.float(), k.float(), beta=0.5, alpha=0.3)
    precision.compute_wide("cpu")
    rounded = torch.bmm(q, k), torch.baddbmm(mask, q, k, beta=0.5, alpha=0.3)
    assert all(torch.equal(mine, theirs.to(dtype)) for mine, theirs in zip(rounded, exact, strict=True))
    wide = torch.bmm(q.float(), k.float()), torch.baddbmm(mask.float(), q.float(), k.float(), beta=0.5, alpha=0.3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(wide, exact, strict=True))
    out = torch.empty(2, 5, 7, dtype=dtype)
    assert torch.bmm(q, k, out=out) is out, "what is asked in another way is PyTorch's own"


def test_the_switch_is_turned_where_pipelines_are_made_and_leaves_quantised_layers_alone(without_instructions):
    layers, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64).bfloat16()
    quantize_(layers, Int8DynamicActivationInt8WeightConfig())
    before = layers(x)
    pipe = models.load("pocket")
    assert precision.WIDE == {torch.bfloat16, torch.float16} and precision.computes_in(pipe.unet) is torch.float32
    assert torch.equal(layers(x), before)
    assert "computes_in" not in as_run(pipe)
    half_precision(pipe)
    assert precision.computes_in(pipe.unet) is torch.float32 and as_run(pipe)["computes_in"] == "float32"


def test_with_instructions_nothing_is_switched(monkeypatch):
    monkeypatch.setattr(precision, "WIDE", set())
    monkeypatch.setattr(precision, "_has_instructions", lambda dtype: True)
    stock = nn.Linear.forward
    pipe = half_precision(models.load("pocket"))
    assert nn.Linear.forward is stock and precision.computes_in(pipe.unet) is torch.bfloat16 and "computes_in" not in as_run(pipe)


def test_bad_input(sdxl):
    with pytest.raises(UserError, match="convolutions, everywhere, nowhere"):
        full_precision(sdxl, "on")
    with pytest.raises(UserError, match="no half precision"):
        half_precision(sdxl, torch.float64)
