"""Linear layers in e4m3: one by one against float64, and a whole UNet of them on the fused kernels.

What a test allows follows from the format: 3 bits after the leading one, so no number is off by more than 2**-4 of itself, and
where powers of two end, 2**-15 of its row's largest, by 2**-10 of the row's scale.
"""

import copy
from math import sqrt

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from tiny import tiny_sdxl
from torch import nn

from sdopt.engine import bounds, fp8, fused
from sdopt.engine.fp8 import Layer, Rounding
from sdopt.engine.once import Once, using
from sdopt.errors import UserError
from sdopt.kernels import gated_bound, linear_geglu, prompt_attention, self_attention, to_float8

STEP, LAST = 2.0**-4, 2.0**-10
SUMMED = 2.0**-10  # of the sum of absolute products: tensor cores add in fewer bits than float32 has; the result in bfloat16
TYPICAL = STEP * sqrt(2 / 3)  # two factors, each off by up to STEP, evenly: what a sum of many products is off by


def exactly(scaled):
    return scaled.values.double() * scaled.scale.double()


def bound_after(*place):
    return bounds.of_each([place])[0]


def may_be_off(x, scale):
    return torch.maximum(STEP * x.abs(), LAST * scale.double())


def assert_product(ours, x, weight, bias, x_scale, weight_scale):
    """Every number of `ours` within what rounding each factor may cost it; all together within what it typically does."""
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + (0 if bias is None else bias.double())
    off_x, off_weight = may_be_off(x, x_scale), may_be_off(weight, weight_scale)
    allowed = off_x @ weight.abs().T + x.abs() @ off_weight.T + off_x @ off_weight.T
    allowed += SUMMED * (x.abs() @ weight.abs().T) * 1.2 + 2.0**-8 * (exact.abs() + allowed) + 1e-12
    off = (ours.double() - exact).abs()
    assert ours.dtype is torch.bfloat16 and ours.shape == exact.shape
    assert (off <= allowed).all(), f"{(off / allowed).max():.2f} times what rounding may cost"
    return (off.square().mean().sqrt() / (exact.square().mean().sqrt() + 1e-30)).item()


def made(inputs, outputs, device, bias=True, parts=1, scales="row", largest=4.0):
    linears = [nn.Linear(inputs, outputs, bias).to(device, torch.bfloat16) for _ in range(parts)]
    norm = nn.LayerNorm(inputs).to(device, torch.bfloat16)  # which gives `largest`, and nothing else
    nn.init.zeros_(norm.weight), nn.init.constant_(norm.bias, largest)
    layer = Layer(linears, (norm,), Rounding(scales, "all"))
    with torch.no_grad():
        fp8.gather([layer])
    return linears, layer


@pytest.mark.parametrize("scales", fp8.SCALES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 320, 96), (7, 16, 16), (1, 640, 32), (300, 48, 208)])
@torch.no_grad()
def test_a_layer_is_off_by_no_more_than_its_format(device, scales, rows, inputs, outputs):
    x = torch.randn(rows, inputs, device=device).bfloat16().clamp(-4, 4)
    (linear,), layer = made(inputs, outputs, device, scales=scales)
    scaled = to_float8.to_float8(x, layer.takes)
    off = assert_product(layer(scaled), x, linear.weight, linear.bias, scaled.scale, layer.weight.scale)
    assert off < TYPICAL


@pytest.mark.parametrize("scales", fp8.SCALES)
@torch.no_grad()
def test_joined_layers_give_their_outputs_in_a_row(device, scales):
    x = torch.randn(2, 9, 64, device=device).bfloat16().clamp(-4, 4)
    linears, layer = made(64, 32, device, bias=False, parts=3, scales=scales)
    with torch.no_grad():
        linears[1].weight.mul_(20)
        fp8.gather([layer])
    scaled = to_float8.to_float8(x, layer.takes)
    ours = layer(scaled).chunk(3, -1)
    scale = layer.weight.scale.split(32) if scales == "row" else [layer.weight.scale] * 3
    for one, linear, of in zip(ours, linears, scale):
        assert one.shape == (2, 9, 32)
        assert assert_product(one.flatten(0, 1), x.flatten(0, 1), linear.weight, None, scaled.scale, of) < TYPICAL


@torch.no_grad()
def test_outliers_in_one_channel(device):
    """A thousand times the rest, in every row: what is left of the rest still has its three bits."""
    x = torch.randn(128, 320, device=device)
    x[:, 17] *= 1000
    x = x.bfloat16()
    (linear,), layer = made(320, 64, device)
    linear.weight[:, 17] = 0  # so that the rest is all that is seen
    fp8.gather([layer])
    scaled = to_float8.to_float8(x)
    off = assert_product(layer(scaled), x, linear.weight, linear.bias, scaled.scale, layer.weight.scale)
    assert off < TYPICAL
    linear.weight[:, 17] = torch.randn(64, device=device).bfloat16()
    fp8.gather([layer])
    assert assert_product(layer(scaled), x, linear.weight, linear.bias, scaled.scale, layer.weight.scale) < TYPICAL


@torch.no_grad()
def test_rows_and_outputs_of_zeros(device):
    x = torch.randn(32, 64, device=device).bfloat16()
    x[3] = 0
    for scales in fp8.SCALES:
        (linear,), layer = made(64, 32, device, scales=scales)
        linear.weight[5] = 0
        fp8.gather([layer])
        y = layer(to_float8.to_float8(x, layer.takes))
        assert y.isfinite().all() and torch.equal(y[3], linear.bias) and (y[:, 5] == linear.bias[5]).all()
        linear.weight.zero_()
        fp8.gather([layer])
        assert torch.equal(layer(to_float8.to_float8(x, layer.takes)), linear.bias.expand(32, -1))


@torch.no_grad()
def test_nothing_a_layer_norm_gives_is_beyond_its_bound():
    """Inputs made to go as far as they can: the bound is reached, nearly, and not passed."""
    torch.manual_seed(0)
    norm, wide = nn.LayerNorm(64), nn.Linear(64, 96)
    norm.weight.copy_(torch.randn(64)), norm.bias.copy_(torch.randn(64))
    farthest = norm(100 * torch.cat([torch.eye(64), -torch.eye(64)])).abs().max()
    assert 0.98 * bounds.of_norm(norm) < farthest <= bounds.of_norm(norm)
    directions = (wide.weight * norm.weight)[:, :]
    x = torch.cat([s * (directions[:48] + t * directions[48:]) for s in (100, -100) for t in (-1, 0, 1)])
    x = torch.cat([x, 100 * torch.randn(4096, 64)])
    value, gate = wide(norm(x)).chunk(2, -1)
    farthest = (value * nn.functional.gelu(gate)).abs().max()
    assert 0.2 * bound_after(norm, wide) < farthest <= bound_after(norm, wide)
    wide.bias = None
    for first in (0, 60):
        farthest = wide(norm(100 * directions))[:, first:].abs().max()
        assert 0.5 * bound_after(norm, wide, first) < farthest <= bound_after(norm, wide, first)


@pytest.mark.parametrize("scales", fp8.SCALES)
@torch.no_grad()
def test_what_is_gathered_together_is_what_each_layer_gathers_alone(device, scales):
    """Of layers of several sizes, with and without a bound; and what bounds them by another way."""
    unet = tiny_sdxl().unet.bfloat16().to(device, memory_format=torch.channels_last)
    for norm in (m for m in unet.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)):
        norm.weight.copy_(torch.randn_like(norm.weight)), norm.bias.copy_(torch.randn_like(norm.bias))
    layers = list(fp8.every_layer(unet, scales).values())[::5]  # of each kind: the interpreter takes its time for all
    numbers = lambda: [
        part.float() for each in layers for part in (*each.weight, each.takes) if isinstance(part, torch.Tensor)
    ]
    for each in layers:
        fp8.gather([each])
    alone = [part.clone() for part in numbers()]
    for part in (part for each in layers for part in (*each.weight, each.takes) if isinstance(part, torch.Tensor)):
        part.zero_()
    fp8.gather(layers)
    assert {each.after and len(each.after) for each in layers} == {None, 1, 2, 3}
    assert all(map(torch.equal, numbers(), alone)) and all(part.abs().max() > 0 for part in alone)
    for each in layers:
        if each.bounded:
            assert each.takes.item() == pytest.approx(bound_by_hand(*each.after) / 448, rel=1e-5)


def bound_by_hand(norm, layer=None, first=None):
    if layer is not None:
        tensors = (layer.weight[first or 0 :], layer.bias, norm.weight, norm.bias)
        double = (None if tensor is None else tensor.double() for tensor in tensors)
        return 1.25 ** (2 if first is None else 1) * gated_bound.reference(*double, gated=first is None).item()
    numbers = norm.num_channels // norm.num_groups * 128 * 128 if isinstance(norm, nn.GroupNorm) else len(norm.weight)
    return (norm.weight.double().abs() * numbers**0.5 + norm.bias.double().abs()).max().item()


@torch.no_grad()
def test_nothing_a_group_norm_gives_is_beyond_its_bound(monkeypatch):
    """One number of a group far from all others, of which there are as many as the bound is for."""
    monkeypatch.setattr(bounds, "POSITIONS", 12)
    norm = nn.GroupNorm(4, 16)
    norm.weight.copy_(torch.randn(16)), norm.bias.copy_(torch.randn(16))
    x = torch.zeros(16, 16, 3, 4)
    x[torch.arange(16), torch.arange(16), 1, 2] = 100
    farthest = torch.cat([norm(x), norm(-x), nn.functional.silu(norm(x))]).abs().max()
    assert 0.95 * bounds.of_norm(norm) < farthest <= bounds.of_norm(norm)


@pytest.mark.parametrize("shape", [(2, 64, 5, 4), (1, 128, 8, 8)], ids=str)
@torch.no_grad()
def test_a_residual_block_is_off_by_what_rounding_alone_costs(device, shape):
    """As the transformer below: against float64, and against float64 with the same numbers rounded to e4m3."""
    torch.manual_seed(1)
    block = next(m for m in tiny_sdxl().unet.modules() if type(m) is ResnetBlock2D and m.in_channels == shape[1]).bfloat16()
    for norm in (block.norm1, block.norm2):
        norm.weight.copy_(0.5 + torch.rand_like(norm.weight))
    x, temb = torch.randn(shape).bfloat16().float(), torch.randn(shape[0], block.time_emb_proj.in_features).bfloat16().float()
    call = lambda block, dtype, device="cpu": block(x.to(device, dtype), temb.to(device, dtype)).double().cpu()
    exact, by_hand = copy.deepcopy(block).double(), copy.deepcopy(block).double()
    for norm, conv in ((by_hand.norm1, by_hand.conv1), (by_hand.norm2, by_hand.conv2)):
        takes = (bounds.of_norm(norm) / 448).float()
        weight = to_float8.reference(conv.weight.permute(0, 2, 3, 1).flatten(1), "row")
        conv.weight.data = exactly(weight).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        conv.register_forward_pre_hook(lambda module, args, takes=takes: (rounded(args[0], takes),))
    exact, by_hand = call(exact, torch.float64), call(by_hand, torch.float64)
    fused.fuse(block.to(device, memory_format=torch.channels_last))
    plain = call(block, torch.bfloat16, device)
    layers = fp8.layers([], Rounding("row", "all"), [block])
    fp8.gather(list(layers.values()))
    with using(Once([], [], [], None, (), layers), {}):
        ours = call(block, torch.bfloat16, device)
    off = lambda y, other: ((y - other).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    assert len(layers) == 2 and all(layer.used for layer in layers.values())
    assert off(by_hand, exact) > 1.5 * off(plain, exact), "it has to matter"
    assert off(ours, exact) < 1.1 * off(by_hand, exact) + off(plain, exact)
    assert off(ours, by_hand) < sqrt(12 / 32) * off(by_hand, exact) + off(plain, exact)


def test_a_convolution_is_worth_it_by_its_own_size(monkeypatch):
    monkeypatch.setattr(fp8, "FEWEST_OF_CONVOLUTION", 64 * 9 * 32 * 16)
    block = ResnetBlock2D(in_channels=32, out_channels=16, temb_channels=None, groups=8).bfloat16()
    taken = {way: fp8.layers([], Rounding("row", way), [block])[block.conv1] for way in fp8.FILTERS}
    assert [taken["measured"].pays(rows) for rows in (63, 64)] == [False, True] and taken["all"].pays(1)


def test_only_convolutions_that_can_be_are_rounded():
    block = ResnetBlock2D(in_channels=40, out_channels=32, temb_channels=None, groups=8).bfloat16()
    assert [*fp8.layers([], Rounding("row", "all"), [block])] == [block.conv2], "40 channels are no multiple of 16"
    assert not fp8.layers([], None, [block])
    block.conv2.weight.data = block.conv2.weight.data.float()
    assert not fp8.layers([], Rounding("row", "all"), [block])


def rounded_by_hand(unet, scales):
    """A copy of `unet` in float64 whose layers round weights and inputs as the engine does, by plain PyTorch."""
    blocks = lambda model: [m for m in model.modules() if type(m) is BasicTransformerBlock]
    given, unet = unet, copy.deepcopy(unet).double()
    for block, own in zip(blocks(unet), blocks(given), strict=True):
        wide, narrow = block.ff.net[0].proj, block.ff.net[2]
        places = {
            **dict.fromkeys((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v), (bounds.of_norm, (own.norm1,))),
            block.attn2.to_q: (bounds.of_norm, (own.norm2,)),
            wide: (bounds.of_norm, (own.norm3,)),
            narrow: (bound_after, (own.norm3, own.ff.net[0].proj)),
            block.attn1.to_out[0]: (bound_after, (own.norm1, own.attn1.to_v, 0)),
            block.attn2.to_out[0]: (lambda: torch.tensor(0.0), ()),  # what no weights tell: the values' largest
        }
        values = []
        block.attn2.to_v.register_forward_hook(lambda module, args, out, seen=values: seen.append(out.abs().max() / 448))
        largest = {linear: (bound(*of) / 448).float() for linear, (bound, of) in places.items()}  # of weights not yet rounded
        farthest = [linear.weight.abs().max() for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
        for linear in places:
            joined = linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
            whole = (max(farthest) if joined else linear.weight.abs().max()) / 448
            alone = narrow, block.attn2.to_q, block.attn2.to_out[0], block.attn1.to_out[0]
            by_row = scales == "row" and linear not in alone
            linear.weight.data = exactly(to_float8.reference(linear.weight.data, "row" if by_row else whole))
            takes = "row" if by_row else values if linear is block.attn2.to_out[0] else largest[linear]
            scale = lambda takes: takes[-1].float() if type(takes) is list else takes
            round_input = lambda module, args, takes=takes: (rounded(args[0], scale(takes)),)
            linear.register_forward_pre_hook(round_input)
    return unet


def rounded(x, scales):
    scaled = to_float8.reference(x, scales)
    scale = scaled.scale if scaled.scale.numel() == 1 else scaled.scale.reshape(*x.shape[:-1], 1)
    return scaled.values.double() * scale.double()


@pytest.mark.parametrize("scales", fp8.SCALES)
@pytest.mark.parametrize("enough", [1, 1024], ids=["many rows", "few rows"])
@torch.no_grad()
def test_a_transformer_is_off_by_what_rounding_alone_costs(device, scales, enough, monkeypatch):
    """In bfloat16, against float64 and against float64 with the same numbers rounded to e4m3; in the interpreter on a CPU.

    Gated in the kernel of the product, or after it.
    """
    ran = []
    monkeypatch.setattr(linear_geglu, "ENOUGH", enough)
    monkeypatch.setattr(fp8, "linear_geglu", lambda *args: (ran.append(1), linear_geglu.linear_geglu(*args))[1])
    model = tiny_sdxl().unet.mid_block.attentions[0].bfloat16()
    torch.manual_seed(1)
    for norm in (m for m in model.modules() if type(m) is nn.LayerNorm):  # as after training, and one channel far out
        norm.weight.copy_(0.5 + torch.rand_like(norm.weight))
        norm.weight[5] *= 8
    x, text = torch.randn(2, 64, 6, 8).bfloat16().float(), torch.randn(2, 7, 64).bfloat16().float()
    call = lambda model, dtype, device="cpu": model(x.to(device, dtype), text.to(device, dtype), return_dict=False)[0].cpu() - x
    exact = call(copy.deepcopy(model).double(), torch.float64)
    by_hand = call(rounded_by_hand(model, scales), torch.float64)
    fused.fuse(model.to(device))
    plain = call(model, torch.bfloat16, device)
    layers = fp8.layers(model.transformer_blocks, Rounding(scales, "all"))
    fp8.gather(list(layers.values()))
    of_prompt = {}
    for attn in (block.attn2 for block in model.transformer_blocks):
        k, v = fused.keys_and_values(attn, text.to(device, torch.bfloat16))
        of_prompt[attn] = k, v, bounds.of_values(v)
    with using(Once([], [], [], None, (), layers), of_prompt):
        ours = call(model, torch.bfloat16, device)
    off = lambda y, other: ((y - other).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    assert len(layers) == 6 * len(model.transformer_blocks) and all(layer.used for layer in layers.values())
    assert len(ran) == (len(model.transformer_blocks) if enough == 1 else 0)
    assert off(by_hand, exact) > 1.5 * off(plain, exact), "it has to matter"
    assert off(ours, exact) < 1.1 * off(by_hand, exact) + off(plain, exact)
    # a number that bfloat16 moved by 1/256 falls to the next of e4m3, 1/8 away, once in 32 times: sqrt(1/32) of a step,
    # where rounding costs sqrt(1/12)
    assert off(ours, by_hand) < sqrt(12 / 32) * off(by_hand, exact) + off(plain, exact)


@torch.no_grad()
def test_a_first_half_without_a_bias_is_gated_apart(device):
    model = tiny_sdxl().unet.mid_block.attentions[0].bfloat16()
    for block in model.transformer_blocks:
        block.ff.net[0].proj.bias = None
    x, text = torch.randn(2, 64, 6, 8).bfloat16().to(device), torch.randn(2, 7, 64).bfloat16().to(device)
    call = lambda: model(x, text, return_dict=False)[0].float()
    fused.fuse(model.to(device))
    plain = call()
    for scales in fp8.SCALES:
        layers = fp8.layers(model.transformer_blocks, Rounding(scales, "all"))
        fp8.gather(list(layers.values()))
        with using(Once([], [], [], None, (), layers), {}):
            assert (call() - plain).abs().max() < 0.1 * plain.abs().max()


@torch.no_grad()
def test_values_of_rounded_numbers_are_not_beyond_their_bound():
    """Of weights and a norm that cancel each other, but for what rounding moves all one way."""
    inputs, halves = 640, torch.tensor([1.07, 1.055]).repeat_interleave(320)
    norm, to_v = nn.LayerNorm(inputs), nn.Linear(inputs, 32, bias=False)
    norm.bias.copy_(halves), norm.weight.fill_(0.01)
    to_v.weight.copy_(torch.tensor([1.0, -1.07 / 1.055]).repeat_interleave(320) * 1.07 / inputs)
    x, weight = (to_float8.reference(t) for t in (norm(torch.randn(16, inputs)), to_v.weight))
    values = (x.values.float() * x.scale) @ (weight.values.float() * weight.scale).T
    assert values.abs().max() > 4 * to_v(norm(torch.randn(16, inputs))).abs().max(), "it has to matter"
    assert values.abs().max() < bound_after(norm, to_v, 0)


def test_an_output_of_attention_is_not_beyond_the_largest_value():
    torch.manual_seed(0)
    q, v = torch.randn(2, 5, 8), torch.randn(2, 1, 8)  # a single key: nothing else to look at
    seen = prompt_attention.reference(q, torch.randn(2, 1, 8), v, 2)
    assert torch.equal(bounds.of_values(v) * 448, v.abs().max()) and seen.abs().max() == v.abs().max()


def test_what_is_worth_it_is_a_question_of_size():
    assert fp8.pays(2048, 1280, 10240) and not fp8.pays(256, 128, 384)
    assert fp8.pays(512, 1280, 1280, "tensor") and not fp8.pays(512, 1280, 1280, "row")
    by_filter = [Layer([nn.Linear(1280, 1280)], None, Rounding("row", filter)) for filter in fp8.FILTERS]
    assert [[layer.pays(rows) for rows in (16, 16384)] for layer in by_filter] == [[False, True], [True, True]]


@torch.no_grad()
def test_only_layers_that_can_be_are_rounded(monkeypatch):
    unet = tiny_sdxl().unet.bfloat16()
    block = next(m for m in unet.modules() if type(m) is BasicTransformerBlock)
    every = Rounding("row", "all")
    ff, out, own_out = block.ff.net, block.attn2.to_out[0], block.attn1.to_out[0]
    assert [*fp8.layers([block], every)] == [block.attn1, block.attn2, out, ff[0].proj, ff[2], own_out]
    assert not fp8.layers([block], None)
    assert own_out not in fp8.layers([block], Rounding("row", "measured")), "heads of 16"
    monkeypatch.setattr(self_attention, "WIDTHS", (32,))
    assert own_out not in fp8.layers([block], every)
    monkeypatch.undo()
    block.attn1.fuse_projections()
    block.attn1.set_processor(FusedAttnProcessor2_0())
    assert fp8.layers([block], every)[own_out].after == (block.norm1, block.attn1.to_qkv, 2 * 64)
    block.attn1.set_processor(AttnProcessor2_0())
    block.attn1.to_v.bias = nn.Parameter(torch.zeros(64).bfloat16())
    assert own_out not in fp8.layers([block], every), "a bias, which the bound does not know"
    block.attn1.to_k.register_forward_hook(lambda *a: None)
    block.ff.net[2].weight.data = block.ff.net[2].weight.data.float()
    block.ff.net[0].proj = nn.Linear(64, 2 * 40).bfloat16()
    block.attn2.to_q = nn.Linear(63, 64, bias=False).bfloat16()
    for part in (out, own_out):
        part.register_forward_hook(lambda *a: None)
    assert [*fp8.layers([block], every)] == [block.ff.net[0].proj]


def test_with_a_scale_for_all_rows_nothing_is_rounded_whose_size_weights_do_not_tell():
    block = next(m for m in tiny_sdxl().unet.bfloat16().modules() if type(m) is BasicTransformerBlock)
    wide, narrow = block.ff.net[0].proj, block.ff.net[2]
    wide.register_forward_hook(lambda module, args, out: 1000 * out)
    taken = {scales: fp8.layers([block], Rounding(scales, "all")) for scales in fp8.SCALES}
    assert narrow in taken["row"] and narrow not in taken["tensor"] and wide not in taken["row"]


def test_words_it_does_not_know():
    assert fp8.asked(None, "row", "measured") is None
    assert fp8.asked("fp8", "tensor", "all") == Rounding("tensor", "all")
    for words, said in (
        (("fp4", "row", "all"), "unknown precision 'fp4': use None or 'fp8'"),
        (("fp8", "column", "all"), "unknown scales 'column': use 'row' or 'tensor'"),
        (("fp8", "row", "some"), "unknown filter 'some': use 'measured' or 'all'"),
        ((None, "tensor", "measured"), "scales and filter are for precision='fp8': give that, too, or leave them out"),
        ((None, "row", "all"), "scales and filter are for precision='fp8': give that, too, or leave them out"),
    ):
        with pytest.raises(UserError, match=said):
            fp8.asked(*words)
