"""The engine with layers in e4m3: on a CPU with the stand-in for CUDA graphs, on a GPU as it is."""

import copy

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from test_engine import RECORDED, captured, gpu_draw, on_gpu, small, tiny  # noqa: F401 (fixtures)
from tiny import psnr

from sdopt import engine, guidance, models, precision
from sdopt.engine import bounds, fp8
from sdopt.errors import UserError
from sdopt.kernels import conv_float8, launch, linear_geglu, self_attention, to_float8

EVERY = {"precision": "fp8", "filter": "all"}
BLOCKS = 8  # of the tiny UNet: 2 of each of its 4 transformers
CONVOLUTIONS = 16  # of its residual blocks


def by_reference(x, scales="row", out=None):
    found = to_float8.reference(x, scales)
    if out is None:
        return found
    out.values.copy_(found.values)
    if out.scale is not scales:
        out.scale.copy_(found.scale)
    return out


def convolved(x, weight):
    return conv_float8.reference(x, weight).bfloat16().contiguous(memory_format=torch.channels_last)


def gated(x, weight, bias, scale):
    """As the kernel: by the rounded numbers, to one scale."""
    wide = lambda part: part.values.float() * part.scale.reshape(*part.values.shape[:-1], 1) if part.scale.ndim else (
        part.values.float() * part.scale)  # fmt: skip
    return to_float8.reference(linear_geglu.reference(wide(x), wide(weight), bias.float()), scale)


@pytest.fixture
def rounding(captured, tiny, monkeypatch):  # noqa: F811
    """The tiny pipeline in bfloat16, on a GPU of compute capability 9.0, as far as it can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fp8, "to_float8", by_reference)
    monkeypatch.setattr(bounds, "gated_bound", bounds._by_pytorch)
    monkeypatch.setattr(fp8, "conv_float8", convolved)
    monkeypatch.setattr(fp8, "linear_geglu", gated)
    monkeypatch.setattr(linear_geglu, "ENOUGH", 1)
    monkeypatch.setattr(launch, "INTERPRETED", True)  # where there is a GPU, too: all kernels are their references
    return precision.half_precision(tiny)


def close(ours, theirs):
    return psnr(ours, theirs) > 25


@pytest.mark.parametrize("scales", fp8.SCALES)
def test_a_prepared_pipeline_draws_nearly_the_same_and_rounds_weights_once_a_picture(rounding, captured, scales):  # noqa: F811
    draw = lambda: small(rounding, num_inference_steps=2 if scales == "row" else 1)  # on a CPU the other is slow
    eager = draw()
    engine.prepare(rounding)
    plain = draw()
    engine.restore(rounding)
    made = len(captured)
    assert engine.prepare(rounding, scales=scales, **EVERY) is engine.prepare(rounding, scales=scales, **EVERY)
    ours = draw()
    assert len(captured) == made + 3, "what the prompt gives, a step, the decoder"
    assert engine.fp8_layers(rounding) == 6 * BLOCKS + CONVOLUTIONS
    assert close(ours, eager) and not np.array_equal(ours, plain)
    assert not rounding.unet.forward.held.joined, "which nobody needs"
    assert np.array_equal(draw(), ours) and len(captured) == made + 3 and captured.of_weights == 2, "one a preparation"
    engine.restore(rounding)
    assert np.array_equal(draw(), eager) and engine.fp8_layers(rounding) == 0


@RECORDED
def test_weights_changed_in_place_are_rounded_again(rounding, captured):  # noqa: F811
    engine.prepare(rounding, **EVERY)
    before = small(rounding)
    made = len(captured)
    for name, weight in rounding.unet.named_parameters():
        if any(part in name for part in ("to_q", "to_v", "ff.net", "norm3")):
            weight.data.mul_(1.5)  # as peft writes: no version counts it
    ours = small(rounding)
    assert len(captured) == made and np.abs(ours - before).max() > 1e-3
    engine.restore(rounding)
    eager = small(rounding)
    assert psnr(ours, eager) > psnr(before, eager) + 5, "the picture of the new weights"
    assert np.array_equal(small(engine.prepare(rounding, **EVERY)), ours), "and as one that never had others draws it"


@pytest.mark.parametrize("scales", fp8.SCALES)
def test_weights_are_rounded_again_as_if_they_had_always_been_so(rounding, scales):
    once = {"num_inference_steps": 1}
    engine.prepare(rounding, scales=scales, **EVERY)
    before = small(rounding, **once)
    for name, weight in rounding.unet.named_parameters():
        if any(part in name for part in ("to_q", "to_v", "ff.net", "norm1", "norm3")):
            weight.data.mul_(1.5)
    ours = small(rounding, **once)
    engine.restore(rounding)
    assert np.array_equal(small(engine.prepare(rounding, scales=scales, **EVERY), **once), ours)
    assert np.abs(ours - before).max() > 1e-3


def test_a_lora_is_not_rounded_until_it_is_part_of_the_weights(rounding, captured, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fp8, "_fits_convolution", lambda conv: False)  # the linear layers by themselves
    engine.prepare(rounding, **EVERY)
    before = small(rounding)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "ff.net.2"], init_lora_weights=False)
    rounding.unet.add_adapter(config)
    seen = [small(rounding)]
    assert engine.fp8_layers(rounding) == BLOCKS, "the first half of each feed-forward alone has no LoRA"
    rounding.fuse_lora(components=["unet"])
    seen.append(small(rounding))
    assert engine.fp8_layers(rounding) == 6 * BLOCKS
    assert np.abs(seen[0] - before).max() > 1e-2 and close(*seen)
    rounding.unet.disable_adapters()
    small(rounding)
    assert engine.fp8_layers(rounding) == BLOCKS, "peft takes it out of the weights when it is next called"
    rounding.unet.enable_adapters()
    rounding.unet.delete_adapters(["default"])
    rounding.unet.unload_lora()
    after = small(rounding)
    assert engine.fp8_layers(rounding) == 6 * BLOCKS and psnr(after, before) > 35, "up to what fusing rounds off the weights"


def test_a_small_model_has_no_layer_that_gains(rounding):
    plain = small(engine.prepare(rounding))
    engine.restore(rounding)
    ours = small(engine.prepare(rounding, precision="fp8"))
    assert engine.fp8_layers(rounding) == 0 and np.array_equal(ours, plain)


@RECORDED
def test_few_rows_may_not_be_worth_it_where_many_are(rounding, captured, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fp8, "FEWEST", dict.fromkeys(fp8.SCALES, 2 * 16 * 64 * 256))
    engine.prepare(rounding, precision="fp8")
    few = small(rounding, height=8, width=8)
    held = rounding.unet.forward.held
    assert engine.fp8_layers(rounding) == 0 and len(held.joined) == BLOCKS, "as without fp8"
    small(rounding)
    assert engine.fp8_layers(rounding) == 2 * BLOCKS, "a feed-forward's two halves"
    for name, weight in rounding.unet.named_parameters():
        if "attn1.to_v" in name:
            weight.data.mul_(2)
    ours = small(rounding, height=8, width=8)
    engine.restore(rounding)
    assert np.abs(ours - few).max() > 1e-3
    assert np.array_equal(ours, small(engine.prepare(rounding), height=8, width=8))


@pytest.mark.parametrize(("width", "kinds"), [(16, 4), (64, 3)], ids=["heads of its width", "others"])
def test_what_self_attention_gives_is_rounded_where_it_attends(rounding, monkeypatch, width, kinds):
    """By the measured rule: what has one scale is taken, and that it gains only where our kernel attends."""
    eager = small(rounding)
    monkeypatch.setattr(self_attention, "FAST", width)
    monkeypatch.setattr(fp8, "FEWEST", {"row": 2**40, "tensor": 1})
    engine.prepare(rounding, precision="fp8")
    ours = small(rounding)
    held = rounding.unet.forward.held
    outputs = [part.to_out[0] for name, part in rounding.unet.named_modules() if name.endswith("attn1")]
    assert [layer in held.rounded for layer in outputs] == [width == 16] * BLOCKS
    assert engine.fp8_layers(rounding) == kinds * BLOCKS, "cross-attentions' queries, and outputs, and second halves"
    assert close(ours, eager)


def test_the_first_picture_may_be_drawn_in_inference_mode(rounding):
    engine.prepare(rounding, **EVERY)
    with torch.inference_mode():
        first = small(rounding)
    assert np.array_equal(small(rounding), first)


def test_a_cutoff_changes_the_batch(rounding):
    call = {"num_inference_steps": 3} | guidance.cutoff(rounding, 0.4)
    eager = small(rounding, **call)
    assert close(small(engine.prepare(rounding, **EVERY), **call), eager)


def test_fused_projections_are_rounded_as_one(rounding):
    rounding.fuse_qkv_projections()
    eager = small(rounding)
    assert close(small(engine.prepare(rounding, **EVERY)), eager)
    assert engine.fp8_layers(rounding) == 6 * BLOCKS + CONVOLUTIONS


def test_what_is_not_known_runs_eagerly_in_bfloat16(rounding):
    engine.prepare(rounding, **EVERY)
    small(rounding)
    rounding.unet.conv_in.register_forward_hook(lambda module, args, out: out)
    with pytest.warns(UserWarning, match="conv_in has a hook"):
        ours = small(rounding)
    engine.restore(rounding)
    assert psnr(ours, small(rounding)) > 40


def test_a_pipeline_that_leaves_bfloat16_is_right_all_the_same(rounding):
    engine.prepare(rounding, **EVERY)
    small(rounding)
    rounding.to(torch.float32)
    ours = small(rounding)
    assert engine.fp8_layers(rounding) == 0
    engine.restore(rounding)
    assert np.abs(ours - small(rounding)).max() < 1e-4


def test_what_cannot_be_rounded_is_told_in_one_line(rounding, monkeypatch):
    def refuse(said, **settings):
        with pytest.raises(UserError, match=said) as told:
            engine.prepare(rounding, **settings)
        assert "\n" not in str(told.value)

    refuse("unknown precision 'fp4'", precision="fp4")
    refuse("unknown scales 'block'", precision="fp8", scales="block")
    for found, told in (((7, 5), "7.5"), ((8, 0), "8.0"), ((8, 6), "8.6")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=found: found)
        refuse(f"8.9 or later .*, this one has {told}", precision="fp8")
    assert not engine.is_prepared(rounding) and "forward" not in vars(rounding.vae.decoder)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    engine.restore(engine.prepare(rounding, precision="fp8"))

    def unsupported(*args, **kwargs):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_scaled_mm", unsupported)
        refuse("no fp8 product with scales='row' .*NOT_SUPPORTED", precision="fp8")
    rounding.to(torch.float16)
    refuse("in bfloat16, this one is in float16", precision="fp8")
    rounding.to(torch.bfloat16)
    engine.prepare(rounding)
    refuse("another precision: call engine.restore", precision="fp8")


@pytest.mark.gpu
def test_gpu_a_t4_is_told_so(on_gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UserError, match="8.9 or later .*, this one has 7.5"):
        engine.prepare(on_gpu, precision="fp8")
    assert not engine.is_prepared(on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", fp8.SCALES)
def test_gpu_pictures_in_any_order(on_gpu, scales):  # noqa: F811
    texts = ("a red ball", "two green cones")
    calls = [{"prompts": texts[: 1 + n % 2], "side": (256, 192)[n // 2 % 2], "seed": n} for n in range(6)]
    eager = [gpu_draw(on_gpu, **call) for call in calls]
    engine.prepare(on_gpu, scales=scales, keep=4, **EVERY)
    ours = [gpu_draw(on_gpu, **call) for call in calls]
    assert all(psnr(one, right) > 20 for one, right in zip(ours, eager))
    blocks = sum(len(m.transformer_blocks) for m in on_gpu.unet.modules() if hasattr(m, "transformer_blocks"))
    convolutions = 2 * sum(type(m) is ResnetBlock2D for m in on_gpu.unet.modules())
    assert engine.fp8_layers(on_gpu) == 6 * blocks + convolutions and not on_gpu.unet.forward.said
    for n in (3, 0, 5):
        assert np.array_equal(gpu_draw(on_gpu, **calls[n]), ours[n])
    engine.restore(on_gpu)
    assert np.array_equal(gpu_draw(on_gpu, **calls[0]), eager[0])


@pytest.mark.gpu
def test_gpu_the_loop_never_waits(on_gpu):  # noqa: F811
    engine.prepare(on_gpu, **EVERY)
    gpu_draw(on_gpu)

    def forbid(pipe, step, timestep, kwargs):
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")
        return {}

    try:
        gpu_draw(on_gpu, callback_on_step_end=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.fp8_layers(on_gpu)


@pytest.mark.gpu
def test_gpu_weights_changed_in_place_show_in_the_next_picture(on_gpu):  # noqa: F811
    engine.prepare(on_gpu, **EVERY)
    before = gpu_draw(on_gpu)
    for name, weight in on_gpu.unet.named_parameters():
        if any(part in name for part in ("to_q", "to_v", "ff.net")):
            weight.data.mul_(0.8)
    ours = gpu_draw(on_gpu)
    assert not np.array_equal(ours, before)
    engine.restore(on_gpu)
    again = gpu_draw(engine.prepare(on_gpu, **EVERY))
    assert np.array_equal(ours, again), "rounded as if they had always been so"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("scales", fp8.SCALES)
def test_gpu_the_unet_is_off_by_what_rounding_costs(on_gpu, scales):  # noqa: F811
    """RMS of a UNet call against float32 over eight inputs: more than in bfloat16, and no more than the format explains."""
    exact = copy.deepcopy(on_gpu.unet).float()
    torch.manual_seed(0)
    new, width = lambda *shape: torch.randn(shape, device="cuda"), exact.config.cross_attention_dim
    times = torch.tensor((950.0, 800.0, 650.0, 500.0, 350.0, 200.0, 100.0, 20.0), device="cuda")
    inputs = [(new(1, 4, 32, 32), t, new(1, 48, width)) for t in times]
    right = torch.cat([exact(*call).sample for call in inputs])
    half = lambda call: (call[0].bfloat16(), call[1], call[2].bfloat16())

    def off():
        ours = torch.cat([on_gpu.unet(*half(call)).sample.float() for call in inputs])
        return ((ours - right).square().mean() / right.square().mean()).sqrt().item()

    plain = off()
    engine.prepare(on_gpu, scales=scales, **EVERY)
    ours = off()
    assert plain < ours < 2**-3, (plain, ours)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_products_of_sdxls_sizes_with_an_outlier_channel(monkeypatch):
    """Fast accumulation, over up to 5120 products: no further off than three bits of each factor, typically."""
    torch.manual_seed(0)
    sizes = ((2048, 1280, 3840), (2048, 5120, 1280), (8192, 640, 5120), (1024, 2560, 640), (77, 1280, 1280))
    for rows, inputs, outputs in sizes:
        x = torch.randn(rows, inputs, device="cuda")
        x[:, 3] *= 100
        x, linear = x.bfloat16(), torch.nn.Linear(inputs, outputs).cuda().bfloat16()
        layer = fp8.Layer([linear], lambda: x.abs().max(), fp8.Rounding("row", "all"))
        fp8.gather([layer])
        exact = x.double() @ linear.weight.double().T + linear.bias.double()
        off = layer(to_float8.to_float8(x)).double() - exact
        assert off.square().mean().sqrt() < 2**-4 * (2 / 3) ** 0.5 * exact.square().mean().sqrt(), (rows, inputs, outputs)


@pytest.mark.gpu
def test_gpu_preparing_takes_seconds_and_a_byte_a_weight():
    """Of a model with Stable Diffusion 1.5's sizes: rounding all its layers."""
    pipe = precision.half_precision(models.load("sd15", "random", "cuda"))
    pipe.set_progress_bar_config(disable=True)
    engine.prepare(pipe, **EVERY)
    gpu_draw(pipe, side=512, steps=2)
    rounded = pipe.unet.forward.held.rounded
    assert len(rounded) == 5 * 16 + 2 * 22, "16 transformer blocks, 22 residual ones"
    assert sum(layer.weight.values.nbytes for layer in rounded.values()) < 0.85 * sum(p.numel() for p in pipe.unet.parameters())
