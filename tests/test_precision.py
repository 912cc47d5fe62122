import copy

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny import draw, native, psnr
from torch import nn
from torch.overrides import TorchFunctionMode
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
    for cls, name in ((nn.Conv2d, "_conv_forward"), (nn.Linear, "forward"), (AttnProcessor, "__call__")):
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


class Watched(TorchFunctionMode):
    """Notes the batched products that are called within, and in what they multiply."""

    def __init__(self, products):
        super().__init__()
        self.products = products

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.bmm, torch.baddbmm):
            self.products.append((func.__name__, args[-1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_without_instructions_attention_by_the_formula_multiplies_in_float32_and_rounds(without_instructions, dtype, masked):
    attn, x = Attention(32, heads=2, dim_head=16, processor=AttnProcessor()).to(dtype), torch.randn(2, 6, 32).to(dtype)
    mask = torch.randn(4, 1, 6).to(dtype) if masked else None
    products, bmm, baddbmm = [], torch.bmm, torch.baddbmm
    precision.compute_wide("cpu")
    with Watched(products):
        out = attn(x, attention_mask=mask)
    assert products == [("baddbmm", torch.float32), ("bmm", torch.float32)] and out.dtype is dtype
    q, k, v = (attn.head_to_batch_dim(layer(x)).float() for layer in (attn.to_q, attn.to_k, attn.to_v))
    scores = baddbmm(torch.zeros(1) if mask is None else mask.float(), q, k.mT, beta=int(masked), alpha=attn.scale).to(dtype)
    values = bmm(scores.softmax(-1).float(), v).to(dtype)
    assert torch.equal(out, attn.to_out[0](attn.batch_to_head_dim(values)))
    products.clear()
    with Watched(products):
        attn.float()(x.float())
    assert products == [("baddbmm", torch.float32), ("bmm", torch.float32)]
    assert (torch.bmm, torch.baddbmm) == (bmm, baddbmm), "Inductor knows PyTorch's functions by their names"


def test_without_instructions_attention_by_the_formula_still_compiles_whole(without_instructions):
    attn, x = Attention(32, heads=2, dim_head=16, processor=AttnProcessor()).bfloat16(), torch.randn(2, 6, 32).bfloat16()
    precision.compute_wide("cpu")
    compiled = torch.compile(attn, fullgraph=True)
    torch.testing.assert_close(compiled(x), attn(x), rtol=0.02, atol=0.02)


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
