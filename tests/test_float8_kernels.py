"""The kernels that write e4m3 against float64: on a CPU in Triton's interpreter, on a GPU as they are compiled."""

import pytest
import torch

from sdopt.errors import UserError
from sdopt.kernels import (
    add_layer_norm,
    conv_float8,
    gated_bound,
    geglu,
    group_norm,
    launch,
    linear_geglu,
    prompt_attention,
    self_attention,
    to_float8,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(2, 7, 640), (3, 80), (5, 33), (1, 1)]
LONG = (2, 23040)  # a convolution's 9 * 2560 weights an output
HALF_A_STEP = 2.0**-4  # of e4m3, with 3 bits after the leading one
HALF_OF_LAST = 2.0**-10  # where its powers of two end, steps are 2**-9
SUMMED = 2.0**-12  # of the sum of absolute products: a tensor core keeps some 14 bits of what it has summed so far


def random(shape, dtype, device):
    return torch.randn(shape).to(device, dtype)


def assert_rounded(ours, exact, scales, eps=1e-5):
    """Every number within half a step of float64's, and what `eps` loses; the scale of a row is its largest over 448."""
    rows = exact.reshape(-1, exact.shape[-1])
    if not rows.numel():
        return
    if isinstance(scales, str):
        wanted = rows.abs().amax(1, keepdim=True).clamp(min=to_float8.TINIEST) / 448
        assert ours.scale.shape == wanted.shape and torch.allclose(ours.scale.double(), wanted, rtol=1e-5, atol=0)
    assert ours.values.dtype is torch.float8_e4m3fn and ours.values.shape == exact.shape
    inside = rows.clamp(-448 * ours.scale.double(), 448 * ours.scale.double())
    off = (ours.values.double().reshape(rows.shape) * ours.scale.double() - inside).abs()
    allowed = torch.maximum(HALF_A_STEP * inside.abs(), HALF_OF_LAST * ours.scale.double())
    allowed += eps * inside.abs() + 1e-6 * inside.abs().max()
    assert (off <= allowed).all(), f"{(off / allowed).max():.3f} times what rounding may cost"


@pytest.mark.parametrize("scales", ["row", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROWS, LONG])
def test_to_float8(device, dtype, shape, scales):
    """Also by a scale that most numbers are beyond, which saturates."""
    x = 100 * random(shape, dtype, device)
    scales = torch.tensor(0.05, device=device) if scales == "all" else scales
    ours = to_float8.to_float8(x, scales)
    assert_rounded(ours, x.double(), scales)
    again = to_float8.Scaled(*(torch.zeros_like(t) for t in ours))
    if isinstance(scales, str):
        to_float8.to_float8(x, out=again)
        assert torch.equal(again.values.view(torch.uint8), ours.values.view(torch.uint8))
        assert torch.equal(again.scale, ours.scale)


@pytest.mark.parametrize("scales", ["row", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("added", [True, False])
def test_add_layer_norm(device, dtype, shape, scales, added):
    x, residual = (random(shape, dtype, device) for _ in range(2))
    weight, bias = (random(shape[-1], dtype, device) for _ in range(2))
    scales = torch.tensor(0.02, device=device) if scales == "all" else scales
    residual = residual if added else None
    total, ours = add_layer_norm.add_layer_norm(x, residual, weight, bias, 1e-5, scales)
    assert torch.equal(total, add_layer_norm.add_layer_norm(x, residual, weight, bias)[0])
    _, exact = add_layer_norm.reference(total.double(), None, weight.double(), bias.double())
    assert_rounded(ours, exact, scales)


@pytest.mark.parametrize("scales", ["row", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 2 * 640), (6, 2 * 2560), (5, 2 * 33), (3, 2 * 64), (1, 2)])
def test_geglu(device, dtype, shape, scales):
    x = 3 * random(shape, dtype, device)
    scales = torch.tensor(0.01, device=device) if scales == "all" else scales
    assert_rounded(geglu.geglu(x, scales), geglu.reference(x.double()), scales)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 40), (7, 320), (1, 1), (33, 1280)])
def test_gated_bound(device, dtype, outputs, inputs, biased):
    """Of rows of values and gates far apart in size: a value's bound is multiplied with its own gate's."""
    weight, gamma, beta = (random(shape, dtype, device) for shape in ((2 * outputs, inputs), inputs, inputs))
    weight *= torch.logspace(-1, 1, 2 * outputs, device=device).to(dtype)[:, None]
    bias = 10 * random(2 * outputs, dtype, device) if biased else None
    for gated in (True, False):
        ours = gated_bound.gated_bound(weight, bias, gamma, beta, gated)
        exact = gated_bound.reference(*(None if t is None else t.double() for t in (weight, bias, gamma, beta)), gated)
        assert ours.dtype is torch.float32 and ours.max().item() == pytest.approx(exact.item(), rel=1e-5)


def test_gated_bound_takes_pairs_of_rows(device):
    weight, norm = torch.ones(4, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(UserError, match=r"gated_bound: gamma has shape \[7\], \[8\] was expected"):
        gated_bound.gated_bound(weight, None, norm[:7], norm)
    with pytest.raises(UserError, match=r"weight has shape \[3, 8\], \[2, 8\] was expected"):
        gated_bound.gated_bound(weight[:3], None, norm, norm)
    with pytest.raises(UserError, match="values and gates of 1 to 16384 inputs"):
        gated_bound.gated_bound(weight[:0], None, norm, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "tokens", "heads", "width"), [(70, 77, 2, 64), (5, 9, 3, 24), (0, 7, 1, 8)])
def test_prompt_attention(device, dtype, positions, tokens, heads, width):
    """A mean of values, so the largest of them bounds it."""
    q = random((2, positions, heads * width), dtype, device)
    k, v = (random((2, tokens, heads * width), dtype, device) for _ in range(2))
    scale = (v.abs().max() / 448).float()
    ours = prompt_attention.prompt_attention(q, k, v, heads, scale)
    assert ours.scale is scale
    close = prompt_attention.prompt_attention(q, k, v, heads).double()  # before it is rounded, but to its dtype
    assert_rounded(ours, close, scale, torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 70, 2, 64), (1, 64, 3, 16), (1, 0, 1, 32)])
def test_self_attention(device, dtype, batch, tokens, heads, width):
    """A mean of values, too."""
    qkv = random((batch, tokens, 3 * heads * width), dtype, device)
    scale = (qkv.abs().amax() / 448).float() if tokens else torch.ones((), device=device)
    ours = self_attention.self_attention(qkv, heads, scale)
    assert ours.scale is scale
    close = self_attention.self_attention(qkv, heads).double()
    assert_rounded(ours, close, scale, torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("whole", [0, 2**20], ids=["three kernels", "one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 60, 5, 9), (2, 96, 1, 1), (1, 64, 24, 40), (2, 80, 7, 1)], ids=str)
def test_group_norm(device, dtype, shape, whole, monkeypatch):
    """As a convolution reads it: a line and a column of zeros after each image."""
    monkeypatch.setattr(group_norm, "WHOLE", whole)
    x, groups = random(shape, dtype, device).to(memory_format=torch.channels_last), 5 if shape[1] % 32 else 32
    weight, bias, shift = (random(s, dtype, device) for s in (shape[1], shape[1], shape[:2]))
    scale = torch.tensor(0.02, device=device)
    ours = group_norm.group_norm(x, groups, weight, bias, shift=shift, scale=scale)
    exact = group_norm.reference(x.double(), groups, weight.double(), bias.double(), shift=shift.double())
    assert ours.scale is scale and ours.values.shape == (shape[0], shape[2] + 1, shape[3] + 1, shape[1])
    assert_rounded(ours, to_float8.with_borders(exact), scale)
    assert (ours.values[:, -1].float() == 0).all() and (ours.values[:, :, -1].float() == 0).all()
    assert group_norm.reference(x, groups, weight, bias, scale=scale).values.shape == ours.values.shape


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("scales", ["row", "all"])
@pytest.mark.parametrize(("shape", "outputs"), [((2, 7, 80), 48), ((300, 32), 144), ((1100, 272), 2064), ((1, 16), 16), ((0, 16), 16)], ids=str)
def test_linear_geglu(device, shape, outputs, scales, rounds):
    """A product of rounded numbers, gated, and rounded again, in one kernel; by what each number was rounded to."""
    if device == "cpu" and shape[0] > 1000:
        pytest.skip("several tiles a program, of several steps each: the interpreter takes long")
    x, weight = random(shape, torch.float32, device), random((2 * outputs, shape[-1]), torch.float32, device)
    bias, scale = random(2 * outputs, torch.bfloat16, device), torch.tensor(0.3, device=device)
    of = [scales if scales == "row" else torch.tensor(0.01, device=device)] * 2
    x, weight = (to_float8.to_float8(part, s) if part.numel() else to_float8.reference(part, torch.tensor(1.0, device=device))
                 for part, s in zip((x, weight), of))  # fmt: skip
    if not x.values.numel() and scales == "row":
        x = to_float8.Scaled(x.values, torch.ones(0, 1, device=device))
    wide = lambda part: part.values.double() * (part.scale.double().view(*part.values.shape[:-1], 1) if part.scale.ndim else part.scale)
    exact = linear_geglu.reference(wide(x), wide(weight), bias.double())
    ours = linear_geglu.linear_geglu(x, weight, bias, scale if rounds else None)
    assert (ours.values if rounds else ours).shape == exact.shape
    if not rounds:
        value, gate = torch.nn.functional.linear(wide(x), wide(weight), bias.double()).chunk(2, -1)
        sizes = torch.nn.functional.linear(wide(x).abs(), wide(weight).abs(), bias.double().abs())
        of_value, of_gate = ((SUMMED if ours.is_cuda else 1e-6) * sizes).chunk(2, -1)
        gated = torch.nn.functional.gelu(gate).abs() + 1.13 * of_gate  # gelu is nowhere steeper than that
        allowed = 2.0**-7 * exact.abs() + 1.01 * (of_value * gated + 1.13 * value.abs() * of_gate)
        assert ours.dtype is torch.bfloat16 and ((ours.double() - exact).abs() <= allowed).all()
        return
    assert ours.scale is scale
    if exact.numel():
        close = linear_geglu.linear_geglu(x, weight, bias).double()  # before it is rounded, but to bfloat16
        inside = close.clamp(-448 * 0.3, 448 * 0.3)
        off = (ours.values.double() * scale.double() - inside).abs()
        assert (off <= (HALF_A_STEP + 2.0**-8) * inside.abs() * 1.07 + HALF_OF_LAST * 0.3).all()


@pytest.mark.parametrize("scales", ["row", "all"])
@pytest.mark.parametrize(("shape", "outputs"), [((300, 32), 144), ((1100, 272), 2064)], ids=str)
def test_linear_geglu_by_narrow_tiles(device, shape, outputs, scales, monkeypatch):
    monkeypatch.setattr(linear_geglu, "GAINS", 0)
    taken = linear_geglu.tile_of(shape[0], outputs, to_float8.E4M3, to_float8.E4M3, 2**18, 132)
    assert taken == linear_geglu.NARROW_OF_BYTES
    test_linear_geglu(device, shape, outputs, scales, True)


def test_a_row_of_zeros_and_one_of_the_tiniest_numbers(device):
    x = torch.zeros(4, 64, device=device)
    x[1], x[2], x[3, 5] = 1e-38, torch.randn(64).to(device), -3e38
    ours = to_float8.to_float8(x)
    assert ours.values.float().isfinite().all() and (ours.scale > 0).all() and ours.scale.isfinite().all()
    assert (ours.values[0].float() == 0).all() and ours.values[3, 5].float() == -448
    gated = geglu.geglu(torch.zeros(3, 128, device=device), "row")
    assert (gated.values.float() == 0).all() and (gated.scale > 0).all()
    ones, zeros = torch.ones(3, 64, device=device), torch.zeros(64, device=device)
    _, flat = add_layer_norm.add_layer_norm(ones, None, zeros, zeros, 1e-5, "row")
    assert (flat.values.float() == 0).all() and (flat.scale > 0).all()


def test_one_large_channel_costs_its_own_rows_alone(device):
    """With a scale a row an outlier in one row leaves the others as they were; a scale for all would cost them all."""
    torch.manual_seed(1)
    x = torch.randn(8, 256, device=device)
    plain = to_float8.to_float8(x)
    x[3, 100] = 1e5
    ours = to_float8.to_float8(x)
    others = [row for row in range(8) if row != 3]
    assert torch.equal(ours.values[others].float(), plain.values[others].float())
    assert ours.values[3, 100].float() == 448
    assert_rounded(ours, x.double(), "row")


@pytest.mark.gpu
def test_gpu_nan_stays():
    x = torch.ones(2, 64, device="cuda")
    x[1, 3] = float("nan")
    for scales in ("row", torch.tensor(1.0, device="cuda")):
        values = to_float8.to_float8(x, scales).values.float()
        assert values[1, 3].isnan() and values[0].isfinite().all()


def test_references_agree_with_the_kernels(device):
    x, weight = torch.randn(6, 80, device=device), torch.randn(80, device=device)
    bias, double = torch.randn(80, device=device), lambda scaled: scaled.values.double() * scaled.scale.double()
    pairs = [
        (to_float8.to_float8(x), to_float8.reference(x)),
        (geglu.geglu(x, "row"), geglu.reference(x, "row")),
        *zip(
            add_layer_norm.add_layer_norm(x, x, weight, bias, 1e-5, "row")[1:],
            add_layer_norm.reference(x, x, weight, bias, 1e-5, "row")[1:],
        ),
    ]
    for ours, right in pairs:
        assert torch.allclose(ours.scale, right.scale, rtol=1e-5)
        assert (double(ours) - double(right)).abs().max() <= 32.01 * right.scale.max()  # a step at 448
        assert (double(ours) - double(right)).square().mean() < 1e-3 * double(right).square().mean()


def assert_convolved(ours, x, weight):
    """Each number within what its dtype and the summing of such summands may cost it; all together within what they mostly do.

    A tensor core adds 32 products at a time, and loses up to 2**-13 of what it has summed so far. Of summands of either sign
    that is about the root of their squares' sum, and seldom twice as much.
    """
    exact, eps = conv_float8.reference(x, weight), torch.finfo(ours.dtype).eps
    squares = conv_float8.reference(*(s._replace(values=s.values.double() ** 2, scale=s.scale.double() ** 2) for s in (x, weight)))
    times = 9 * -(-x.values.shape[-1] // 32)
    off, lost = (ours.double() - exact).abs(), 2 * times * 2.0**-13 if ours.is_cuda else 1e-6
    allowed = eps * exact.abs() + lost * squares.sqrt()
    assert (off <= allowed).all(), f"{(off / allowed).max():.2f} times what may be lost"
    mostly = eps + (2**-8 if ours.is_cuda else 1e-6)
    assert off.square().mean().sqrt() <= mostly * exact.square().mean().sqrt()


CONVOLUTIONS = [(2, 32, 5, 9, 48), (1, 16, 8, 8, 16), (3, 80, 4, 6, 130), (2, 272, 3, 3, 128), (1, 48, 1, 1, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_float8(device, dtype, shape):
    """Images of which no side is a tile's, several one after the other, each with borders of its own."""
    batch, channels, high, wide, outputs = shape
    x = 3 * random((batch, channels, high, wide), dtype, device)
    weight = random((outputs, channels, 3, 3), dtype, device)
    x, weight = conv_float8.bordered(x, torch.tensor(0.03, device=device)), conv_float8.rounded(weight)
    ours, exact = conv_float8.conv_float8(x, weight, dtype), conv_float8.reference(x, weight)
    assert ours.dtype is dtype and ours.shape == exact.shape == (batch, outputs, high, wide)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_convolved(ours, x, weight)


def test_conv_float8_of_no_image(device):
    x = to_float8.Scaled(torch.zeros(0, 5, 6, 16, device=device).to(to_float8.E4M3), torch.ones((), device=device))
    weight = conv_float8.rounded(random((8, 16, 3, 3), torch.float32, device))
    assert conv_float8.conv_float8(x, weight).shape == (0, 8, 4, 5)


@pytest.mark.parametrize("tile", conv_float8.TILES, ids=str)
def test_whatever_the_tile_a_convolution_is_the_same(device, tile, monkeypatch):
    """Two tiles and a begun one each way, at least, and channels beyond a step."""
    monkeypatch.setattr(conv_float8, "TILES", {tile: 1})
    x, weight = random((3, 144, 13, 13), torch.float32, device), random((272, 144, 3, 3), torch.float32, device)
    x, weight = conv_float8.bordered(x, torch.tensor(0.01, device=device)), conv_float8.rounded(weight)
    assert_convolved(conv_float8.conv_float8(x, weight, torch.float32), x, weight)
    monkeypatch.setattr(launch, "multiprocessors", lambda x: 2)  # several tiles a program, the last of them begun by one alone
    assert_convolved(conv_float8.conv_float8(x, weight, torch.float32), x, weight)


def test_the_tile_is_the_one_that_is_done_in_the_fewest_turns():
    """The sizes of SDXL's and SD 1.5's levels on an H200; a GPU of fewer multiprocessors, and of less memory, takes others."""
    has = 132, 227 * 1024
    sizes = (128, 320), (64, 640), (32, 1280), (64, 320), (32, 640), (16, 1280), (8, 1280)
    taken = [conv_float8.tile(2 * (lines + 1) ** 2, outputs, *has)[:2] for lines, outputs in sizes]
    assert taken == [(256, 128), (128, 128), (256, 128), (256, 128), (128, 128), (64, 128), (64, 128)]
    assert conv_float8.tile(2 * 9**2, 1280, 10, has[1])[:2] == (256, 128)
    ahead = [conv_float8.tile(2 * 129**2, 320, 132, kib * 1024)[-2:] for kib in (227, 99)]
    assert ahead == [(3, True), (2, False)], "a tile that is written beside others takes their place"
    assert conv_float8.tile(2 * 65**2, 640, 132, 99 * 1024) == (128, 128, 128, 4, 3, False), "nor for fewer steps ahead"
    assert conv_float8.tile(33**2, 1280, *has)[-2:] == (4, False), "a turn is enough"


def test_a_convolution_in_e4m3_is_the_convolution_but_for_rounding(device):
    x = random((2, 64, 6, 7), torch.float32, device)
    weight = random((32, 64, 3, 3), torch.float32, device)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    rounded = conv_float8.bordered(x, x.abs().max() / 448), conv_float8.rounded(weight)
    off = conv_float8.conv_float8(*rounded, torch.float32) - exact
    assert off.square().mean() < (2**-4 * (2 / 3) ** 0.5) ** 2 * exact.square().mean(), "half a step of each factor"


def test_bytes_are_counted():
    x = torch.empty(3, 64, dtype=torch.bfloat16)
    assert to_float8.bytes_moved(x) == 3 * 64 * 3 + 12
    assert geglu.bytes_moved(x, "row") == 3 * 64 * 2 + 3 * 32 + 12
    assert add_layer_norm.bytes_moved(x, x, x, x, 1e-5, "row") == 3 * 64 * 7 + 12


def wrong_convolution(x=(1, 3, 3, 32), weight=(16, 288), scale=(16, 1), dtype=torch.float8_e4m3fn):
    x = to_float8.Scaled(torch.ones(x).to(dtype), torch.ones(()))
    return conv_float8.conv_float8(x, to_float8.Scaled(torch.ones(weight).to(torch.float8_e4m3fn), torch.ones(scale)))


WRONG = {
    "channels": (lambda: wrong_convolution((1, 3, 3, 8), (16, 72)), "8 channels are no multiple of 16"),
    "no image": (lambda: wrong_convolution((3, 3, 32)), "weight has shape"),
    "weights": (lambda: wrong_convolution(weight=(16, 32)), r"weight has shape \[16, 32\], \[16, 288\] was expected"),
    "their scales": (lambda: wrong_convolution(scale=()), "the scale of weight has shape"),
    "not rounded": (lambda: wrong_convolution(dtype=torch.float32), "round both to e4m3"),
    "scales": (lambda: to_float8.to_float8(torch.ones(4, 8), "column"), "unknown scales 'column'"),
    "two scales": (lambda: geglu.geglu(torch.ones(4, 8), torch.ones(2)), "one float32 number"),
    "half a scale": (lambda: geglu.geglu(torch.ones(4, 8), torch.tensor(1.0).half()), "one float32 number"),
    "too long": (lambda: to_float8.to_float8(torch.ones(1, 2**16)), "1 to 32768"),
    "gates": (lambda: geglu.geglu(torch.ones(1, 2**16), "row"), "up to 16384"),
    "dtype": (lambda: to_float8.to_float8(torch.ones(4, 8, dtype=torch.float64)), "not float64"),
    "strided": (lambda: to_float8.to_float8(torch.ones(8, 4).T), "not contiguous"),
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU is there, and Triton compiles for it")
@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_what_a_kernel_cannot_take_is_told_in_one_line(call, said):
    with pytest.raises(UserError, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
def test_gpu_of_an_older_generation_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    x = torch.ones(4, 64, device="cuda")
    for call in (to_float8.to_float8, lambda x: geglu.geglu(x, "row")):
        with pytest.raises(UserError, match="8.9 or later, this GPU has 7.5"):
            call(x)
