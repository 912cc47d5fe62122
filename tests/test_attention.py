import ctypes
import importlib.util
import re
import types

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from tiny import draw
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sdopt.attention import (
    FUSED,
    attended_by,
    fuse_qkv,
    is_fused,
    plain_attention,
    sdpa,
    xformers_attention,
    xformers_state,
)
from sdopt.autoencoders import tiny_vae
from sdopt.errors import UserError
from sdopt.quantization import int8

SAME = {"rtol": 0, "atol": 1e-4}  # of a picture in [0, 1], drawn in fp32: another order of summation


def processors(model):
    return {type(processor) for processor in model.attn_processors.values()}


def add_lora(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False))


def test_plain_attention_and_sdpa_draw_the_same_picture(pipe):
    stock = draw(pipe)
    plain_attention(pipe)
    assert processors(pipe.unet) == processors(pipe.vae) == {AttnProcessor}
    np.testing.assert_allclose(draw(pipe), stock, **SAME)
    sdpa(pipe)
    assert processors(pipe.unet) == processors(pipe.vae) == {AttnProcessor2_0}
    np.testing.assert_array_equal(draw(pipe), stock)


@pytest.mark.parametrize("fused", [False, True])
def test_a_pinned_backend_is_the_one_that_runs(pipe, fused):
    stock = draw(pipe, num_inference_steps=1)
    sdpa(pipe, "math")
    if fused:
        fuse_qkv(pipe)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    pinned = draw(pipe, num_inference_steps=1)
    (args, kwargs) = calls[0]
    # of the UNet's call alone: text encoder and VAE choose their kernels themselves
    with torch.no_grad(), torch.profiler.profile() as profile:
        pipe.unet(*args, **kwargs)
    kernels = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    assert "aten::_scaled_dot_product_attention_math" in kernels
    assert not any("flash" in kernel for kernel in kernels)
    np.testing.assert_allclose(pinned, stock, **SAME)


def test_a_pinned_backend_compiles_without_a_graph_break(pipe, fresh_compiler):
    sdpa(pipe, "math")
    eager = draw(pipe, num_inference_steps=1)
    pipe.unet.compile(fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(draw(pipe, num_inference_steps=1), eager, **SAME)


def test_backends_that_cannot_run_are_refused(sdxl):
    with pytest.raises(UserError, match="unknown attention backend 'fast'"):
        sdpa(sdxl, "fast")
    with pytest.raises(UserError, match="cudnn backend cannot attend"):
        sdpa(sdxl, "cudnn")
    assert processors(sdxl.unet) == {AttnProcessor2_0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_xformers_falls_back_with_a_reason(sdxl):
    plain_attention(sdxl)
    assert "SDPA" in xformers_attention(sdxl)
    assert processors(sdxl.unet) == {AttnProcessor2_0}


def test_fused_projections_draw_the_same_picture(pipe):
    before = draw(pipe)
    fuse_qkv(fuse_qkv(pipe))
    attentions = [part for part in pipe.unet.modules() if isinstance(part, Attention)]
    assert attentions and all(hasattr(part, "to_kv" if part.is_cross_attention else "to_qkv") for part in attentions)
    assert is_fused(pipe.unet) and is_fused(pipe.vae)
    np.testing.assert_allclose(draw(pipe), before, **SAME)


def test_sdpa_after_fusing_keeps_the_projections_fused(pocket):
    fuse_qkv(pocket)
    for part in pocket.unet.modules():
        if isinstance(part, Attention):  # so that going back to the originals would show
            part.to_v.weight.data.zero_()
    before = draw(pocket)
    np.testing.assert_array_equal(draw(sdpa(pocket)), before)
    with pytest.raises(UserError, match="load the pipeline again"):
        plain_attention(pocket)


def test_an_unfused_lora_is_refused_and_a_fused_one_kept(pipe):
    base = draw(pipe)
    add_lora(pipe)
    with pytest.raises(UserError, match=r"pipe.fuse_lora\(\)"):
        fuse_qkv(pipe)
    with_lora = draw(pipe)
    assert np.abs(with_lora - base).max() > 1e-3
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(draw(fuse_qkv(pipe)), with_lora, **SAME)


def test_quantised_projections_are_refused(pocket):
    with pytest.raises(UserError, match="fuse before int8"):
        fuse_qkv(int8(pocket))
    assert not is_fused(pocket.unet)


def test_a_tiny_vae_has_nothing_to_fuse(pocket):
    assert is_fused(fuse_qkv(tiny_vae(pocket)).unet)


@pytest.mark.parametrize("step", [plain_attention, sdpa, fuse_qkv])
def test_an_adapter_is_not_lost(sdxl, step):
    sdxl.unet.set_attn_processor(IPAdapterAttnProcessor2_0(64, 64))
    with pytest.raises(UserError, match="unload the adapter first"):
        step(sdxl)


def test_who_attended_is_told_by_what_ran(sdxl):
    call = lambda: draw(sdxl)
    sdpa(sdxl)
    assert attended_by(call) == ["flash"], "a CPU's own kernel in blocks"
    q = torch.randn(1, 2, 64, 16)
    assert attended_by(lambda: (q @ q.mT).softmax(-1) @ q) == ["math"]
    with sdpa_kernel(SDPBackend.MATH):
        assert attended_by(lambda: scaled_dot_product_attention(q, q, q)) == ["math"]


@pytest.mark.parametrize(
    ("kernel", "backend"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", "cudnn"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>", "flash"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::Collective>>>", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "efficient"),
        ("_self_attention", "ours"),
        ("_prompt_attention", "ours"),
        ("void at::native::(anonymous namespace)::softmax_warp_forward<float>", None),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, backend):
    assert [name for name, pattern in FUSED.items() if re.search(pattern, kernel)] == ([backend] if backend else [])


def test_the_state_of_xformers_names_its_mend(monkeypatch, tmp_path):
    package = tmp_path / "xformers"
    package.mkdir()
    found = types.SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert xformers_state() == "it is not installed: pip install xformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert xformers_state() == "its kernels are for CUDA devices"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "built without kernels" in xformers_state()
    (package / "_C.so").write_bytes(b"no library")
    assert xformers_state().startswith("its kernels cannot be loaded, ")

    def refuse(path):
        raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "need libcudart.so.12: pip install nvidia-cuda-runtime-cu12, and put" in xformers_state()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    assert xformers_state() is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_a_gpus_profile_names_the_backend_that_was_pinned(pocket, backend):
    pocket.to("cuda", torch.bfloat16)
    sdpa(pocket, backend)
    x, text = (torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 32, 32), (77, 256)))
    text = text[..., : pocket.unet.config.cross_attention_dim]
    assert attended_by(lambda: pocket.unet(x, 5, text)) == [backend]
