import numpy as np
import pytest
import torch
from tiny import draw, native, psnr

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


def test_bad_input(sdxl):
    with pytest.raises(UserError, match="convolutions, everywhere, nowhere"):
        full_precision(sdxl, "on")
    with pytest.raises(UserError, match="no half precision"):
        half_precision(sdxl, torch.float64)
