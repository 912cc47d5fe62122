"""Emulated fp8 against the engine's own layers, whose products PyTorch computes on a CPU as well."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from tiny import tiny_sdxl

from sdopt.engine import bounds, fp8
from sdopt.engine.emulated import back, emulated
from sdopt.errors import UserError
from sdopt.kernels import conv_float8, to_float8


@pytest.fixture
def unet():
    unet = tiny_sdxl().unet.bfloat16()
    torch.manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in unet.modules() if type(m) is torch.nn.LayerNorm):  # as after training, one channel far out
            norm.weight.copy_(0.5 + torch.rand_like(norm.weight))
            norm.weight[5] *= 8
        for block in blocks(unet):
            block.attn1.to_v.weight.mul_(20)  # joined with query and key, it decides their one scale
    return unet


def blocks(unet):
    return [part for part in unet.modules() if type(part) is BasicTransformerBlock]


@pytest.mark.parametrize("scales", fp8.SCALES)
@torch.no_grad()
def test_each_layer_gives_what_the_engines_does(unet, scales, monkeypatch):
    def by_reference(x, scales, out):
        for place, value in zip(out, to_float8.reference(x, scales)):
            place.copy_(value)

    monkeypatch.setattr(fp8, "to_float8", by_reference)
    layers = fp8.layers(blocks(unet), fp8.Rounding(scales, "all"))
    for layer in layers.values():
        fp8.gather([layer])
    with emulated(unet, scales) as every:
        parts = {name: part for name, part in every.items() if type(part) is torch.nn.Linear}
        assert set(parts.values()) == {part for layer in layers.values() for part in layer.parts}
        for layer in layers.values():
            x = torch.randn(2, 9, layer.parts[0].in_features).bfloat16()
            x[0, 3] = 0
            theirs = layer(to_float8.reference(x, bounds.of_values(x) if layer.takes is None else layer.takes))
            ours = torch.cat([part(x) for part in layer.parts], -1)
            plain = torch.cat([torch.nn.Linear.forward(part, x) for part in layer.parts], -1)
            off = lambda y: ((y.float() - theirs.float()).square().mean() / theirs.float().square().mean()).sqrt()
            assert ours.dtype is torch.bfloat16 and off(ours) < 2**-8
            assert off(plain) > 4 * off(ours), "it has to matter"


@torch.no_grad()
def test_afterwards_the_layers_are_as_they_were(unet):
    part = blocks(unet)[0].ff.net[2]
    x = torch.randn(4, part.in_features).bfloat16()
    before = part(x)
    with pytest.raises(ZeroDivisionError), emulated(unet) as parts:
        assert unet.get_submodule(next(name for name in parts if parts[name] is part)) is part
        assert not torch.equal(part(x), before)
        1 / 0
    assert torch.equal(part(x), before) and "forward" not in vars(part)


def test_other_scales_are_refused(unet):
    with pytest.raises(UserError, match="fp8 is for a UNet in bfloat16, this one is in float32"), emulated(tiny_sdxl().unet):
        pass
    with pytest.raises(UserError, match="unknown scales 'column'"), emulated(unet, "column"):
        pass


def test_what_rounded_numbers_stand_for():
    x = torch.randn(2, 3, 40)
    for scales in ("row", torch.tensor(0.02)):
        y = back(to_float8.reference(x, scales))
        assert y.dtype is torch.float32 and y.shape == x.shape
        assert ((y - x).abs() <= x.abs() / 16 + 1e-4).all()
    x[1, 2] = 0
    assert (back(to_float8.reference(x))[1, 2] == 0).all()


@torch.no_grad()
def test_a_convolution_gives_what_the_engines_does(unet):
    conv = next(part for part in unet.modules() if type(part) is ResnetBlock2D).conv2
    x = 0.1 * torch.randn(2, conv.in_channels, 5, 4).bfloat16()
    plain = conv(x)
    with emulated(unet) as parts:
        assert sum(type(part) is torch.nn.Conv2d for part in parts.values()) == 2 * sum(
            type(part) is ResnetBlock2D for part in unet.modules()
        )
        ours = conv(x).float()
    norm = next(part for part in unet.modules() if getattr(part, "conv2", None) is conv).norm2
    image = to_float8.reference(to_float8.with_borders(x), bounds.scale_of(bounds.of_norm(norm)))
    weight = to_float8.reference(conv.weight.permute(0, 2, 3, 1).flatten(1))
    theirs = conv_float8.reference(image, weight) + conv.bias.double()[:, None, None]
    off = lambda y: ((y - theirs).square().mean() / theirs.square().mean()).sqrt()
    assert off(ours) < 2**-8 and off(plain) > 4 * off(ours)


def test_blocks_that_the_engine_leaves_alone_are_left_alone(unet):
    """Such as those whose first attention is over the prompt, too: no layer norm says what its values are."""
    for block in blocks(unet)[1:]:
        block.only_cross_attention = True
    linears = lambda layers: [name for name, part in layers.items() if type(part) is torch.nn.Linear]
    with emulated(unet) as layers:
        assert len(linears(layers)) == 8, "of the first block: query, key and value, two outputs, a query, two halves"
