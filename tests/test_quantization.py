import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tiny import draw, native, psnr, tiny_sdxl
from torchao.quantization import Float8Tensor

from sdopt.attention import fuse_qkv
from sdopt.compilation import compile_pipeline
from sdopt.errors import UserError
from sdopt.models import CONFIGS
from sdopt.quantization import (
    GENERAL,
    HOPPER,
    SDXL,
    TUTORIAL_SPARES,
    explain,
    gains_nowhere,
    has_fp8,
    int8,
    int8_layers,
    rules,
    torchao_fp8,
    torchao_fp8_layers,
    tutorial_int8,
)

# diffusers' "Accelerate inference" tutorial, dynamic_quant_filter_fn: (inputs, outputs) left in bfloat16
TUTORIAL = {
    (1280, 640), (1920, 1280), (1920, 640), (2048, 1280), (2048, 2560), (2560, 1280), (256, 128), (2816, 1280),
    (320, 640), (512, 1536), (512, 256), (512, 512), (640, 1280), (640, 1920), (640, 320), (640, 5120), (640, 640),
    (960, 320), (960, 640),
}  # fmt: skip


@pytest.fixture(scope="module")
def full_sdxl():
    """The real SDXL's UNet and VAE, shapes without weights, fused."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((CONFIGS / "sdxl" / "unet.json").read_text()))
        vae = AutoencoderKL.from_config(json.loads((CONFIGS / "sdxl" / "vae.json").read_text()))
    for model in (unet, vae):
        for part in model.modules():
            if isinstance(part, Attention):
                with torch.no_grad():
                    part.fuse_projections()
    return SimpleNamespace(unet=unet, vae=vae)


def test_sdxl_follows_the_tutorial_but_for_the_layers_named_here(full_sdxl):
    assert rules(full_sdxl) is SDXL
    linear = [layer for layer in explain(full_sdxl) if not layer.convolution]
    tutorials = {layer.name for layer in linear if layer.inputs > 16 and (layer.inputs, layer.outputs) not in TUTORIAL}
    differs = [layer for layer in linear if layer.quantised != (layer.name in tutorials)]
    # The tutorial quantises these too: layers that are never called, and the time embedding, a row or two a call.
    assert {layer.rule.name for layer in differs} == {"unused", "time embedding"}
    taken = Counter((layer.inputs, layer.outputs) for layer in linear if layer.quantised)
    assert taken.keys() == {(1280, 1280), (1280, 3840), (1280, 10240), (5120, 1280), (2560, 640)}


def test_every_rule_has_a_reason_and_is_used(full_sdxl, pocket):
    fuse_qkv(pocket)
    for pipe, chosen in ((full_sdxl, SDXL), (pocket, GENERAL)):
        used = {layer.rule.name for layer in explain(pipe) if layer.rule}
        assert used == {rule.name for rule in chosen} - {"small"}  # for which neither has a layer: tested below
        assert all(rule.reason for rule in chosen)


def test_the_choice_for_pocket(pocket):
    fuse_qkv(pocket)
    layers = {layer.name: layer for layer in explain(pocket) if layer.model == "unet"}
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    for name in ("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "ff.net.0.proj", "ff.net.2"):
        assert layers[f"{block}.{name}"].quantised
    projection = layers["down_blocks.1.attentions.0.proj_in"]
    assert projection.convolution and projection.quantised
    spared = {
        f"{block}.attn1.to_q": "unused",
        f"{block}.attn2.to_k": "unused",
        f"{block}.attn2.to_kv": "prompt",
        "time_embedding.linear_1": "time embedding",
        "down_blocks.0.resnets.0.time_emb_proj": "time embedding",
        "up_blocks.0.resnets.0.conv_shortcut": "shortcut",
    }
    assert {name: layers[name].rule.name for name in spared} == spared


def test_a_layer_with_few_inputs_or_outputs_is_spared():
    (small,) = (rule for rule in GENERAL if rule.name == "small")
    covered = [small.covers("ff.net.2", None, *shape) for shape in ((63, 512), (512, 63), (64, 64))]
    assert covered == [True, True, False]


def test_int8_is_where_explain_says_and_the_picture_stays(pipe):
    before = draw(pipe, **native(pipe))
    fuse_qkv(pipe)
    expected = explain(pipe)
    settings = torch._inductor.config.get_config_copy()
    int8(pipe)
    once = draw(pipe, **native(pipe))
    assert explain(pipe) == expected
    for model, root in (("unet", pipe.unet), ("vae", pipe.vae.decoder)):
        taken = {
            name.removesuffix(".mod")
            for name, part in root.named_modules()
            if isinstance(part, torch.nn.Linear) and type(part.weight.data) is not torch.Tensor
        }
        assert taken == {layer.name for layer in expected if layer.model == model and layer.quantised}
    assert 35 < psnr(once, before) < 80
    np.testing.assert_array_equal(draw(int8(pipe), **native(pipe)), once)
    assert torch._inductor.config.get_config_copy() == settings


def test_int8_compiles_without_a_graph_break(pocket, fresh_compiler):
    eager = draw(int8(fuse_qkv(pocket)), num_inference_steps=1)
    compile_pipeline(pocket, backend="aot_eager")
    np.testing.assert_allclose(draw(pocket, num_inference_steps=1), eager, rtol=0, atol=1e-3)


def test_a_compiled_pipeline_is_refused(pocket):
    compile_pipeline(pocket, backend="aot_eager")
    with pytest.raises(UserError, match="int8 before compile"):
        int8(pocket)


def test_on_a_hopper_gpu_int8_changes_nothing_unless_wanted_anyway(monkeypatch, full_sdxl):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    config, gpu = full_sdxl.unet.config, torch.device("cuda:0")
    pipe = SimpleNamespace(unet=SimpleNamespace(config=config, device=gpu))
    assert gains_nowhere("cuda") and rules(pipe) == (*SDXL, HOPPER) and rules(pipe, anyway=True) == SDXL
    assert all(rule.covers("ff.net.2", None, 5120, 1280) is (rule is HOPPER) for rule in rules(pipe))
    capability[0] = (8, 0)
    assert not gains_nowhere("cuda") and rules(pipe) == SDXL
    assert not gains_nowhere("cpu")


def test_where_no_layer_gains_none_is_touched(pocket, monkeypatch):
    monkeypatch.setattr("sdopt.quantization.gains_nowhere", lambda device: True)
    before = draw(pocket)
    np.testing.assert_array_equal(draw(int8(pocket)), before)
    assert int8_layers(pocket) == 0 and {layer.rule.name for layer in explain(pocket)} >= {"this GPU"}
    taken = sum(layer.quantised for layer in explain(pocket, anyway=True))
    assert int8_layers(int8(pocket, anyway=True)) == taken > 0


def test_the_tutorials_int8_takes_what_its_filter_takes(pipe):
    assert TUTORIAL_SPARES == TUTORIAL
    before = draw(pipe, **native(pipe))
    fuse_qkv(pipe)
    tutorial_int8(pipe)
    linear = {name: part for name, part in pipe.unet.named_modules() if isinstance(part, torch.nn.Linear)}
    rounded = {name for name, part in linear.items() if type(part.weight.data) is not torch.Tensor}
    assert rounded and all(linear[name].in_features > 16 for name in rounded)
    few = {name for name in linear if "time_emb" in name or "add_embedding" in name}
    listed = {name for name, part in linear.items() if (part.in_features, part.out_features) in TUTORIAL}
    assert not rounded & (few | listed) and rounded | few | listed == set(linear)
    ones = [m for m in pipe.unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert not any(128 in conv.weight.shape[:2] for conv in ones), "they are linear layers now"
    assert any("conv_shortcut" in name for name in linear)
    assert 30 < psnr(draw(pipe, **native(pipe)), before) < 80


def test_fp8_is_for_gpus_from_compute_capability_8_9_on(pocket, monkeypatch):
    assert not has_fp8("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, has in (((7, 5), False), ((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        assert has_fp8("cuda") == has
    with pytest.raises(UserError, match="8.9 or later"):
        torchao_fp8(pocket)
    monkeypatch.setattr("sdopt.quantization.has_fp8", lambda device: True)
    with pytest.raises(UserError, match="in float32: convert it first"):
        torchao_fp8(pocket)
    assert torchao_fp8_layers(pocket) == 0


def test_torchaos_fp8_takes_the_layers_that_int8s_rules_leave(pocket, monkeypatch):
    """All but the rounding itself, which torchao refuses on a CPU."""
    taken = []

    def quantize(root, config, chosen):
        assert [type(part).__name__ for part in config.granularity] == ["PerRow", "PerRow"]
        zeros = torch.zeros(2, 16).bfloat16()  # what attention makes of SDXL's empty prompt: its embeddings are zeros
        rounded = Float8Tensor.from_hp(zeros, hp_value_lb=config.activation_value_lb, hp_value_ub=config.activation_value_ub)
        assert torch.equal(rounded.dequantize(), zeros)
        taken.extend(name for name, part in root.named_modules() if chosen(part, name))

    monkeypatch.setattr("sdopt.quantization.has_fp8", lambda device: True)
    monkeypatch.setattr("torchao.quantization.quantize_", quantize)
    fuse_qkv(pocket)
    torchao_fp8(pocket.to(torch.bfloat16))
    assert {name.rsplit(".", 1)[-1] for name in taken} >= {"to_qkv", "proj", "2", "to_q"} and len(taken) > 20
    assert not any(word in name for name in taken for word in ("time_emb", "attn2.to_k", "attn2.to_v", "conv_shortcut"))


@pytest.mark.gpu
def test_gpu_torchaos_fp8_draws_nearly_the_same(pocket):
    if not has_fp8("cuda"):
        pytest.skip("this GPU has no fp8")
    pipe = pocket.to("cuda", torch.bfloat16)
    before = draw(pipe, **native(pipe))
    fuse_qkv(pipe)
    torchao_fp8(pipe)
    assert torchao_fp8_layers(pipe) > 20 and psnr(draw(pipe, **native(pipe)), before) > 20


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_torchaos_fp8_survives_a_prompt_of_zeros():
    """SDXL's empty prompt: its values are zeros, and so is what attention over it gives to the next layer."""
    if not has_fp8("cuda"):
        pytest.skip("this GPU has no fp8")
    pipe = torchao_fp8(tiny_sdxl().to("cuda", torch.bfloat16))
    assert torchao_fp8_layers(pipe) > 5
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    added = {"text_embeds": 0 * new(1, pipe.text_encoder_2.config.projection_dim), "time_ids": new(1, 6)}
    text = 0 * new(1, 77, pipe.unet.config.cross_attention_dim)
    assert pipe.unet(new(1, 4, 16, 16), 500, text, added_cond_kwargs=added).sample.isfinite().all()
