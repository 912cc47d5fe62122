"""The Triton kernels against float64: on a CPU in Triton's interpreter, on a GPU as they are compiled."""

import os
import subprocess
import sys

import pytest
import torch

from sdopt.errors import UserError
from sdopt.kernels import (
    add_layer_norm,
    bias_residual,
    geglu,
    group_norm,
    launch,
    linear_geglu,
    prompt_attention,
    self_attention,
    shortcut,
    softmax,
    upsample_conv,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMAGES = [(2, 64, 8, 8), (3, 60, 5, 9)]  # batch, channels, height, width
ROWS = [(2, 7, 640), (3, 33), (1, 1)]


def random(shape, dtype, device, mean=0.0):
    return (torch.randn(shape) + mean).to(device, dtype)


def image(shape, dtype, device, mean=0.0):
    return random(shape, dtype, device, mean).to(memory_format=torch.channels_last)


def assert_close(ours, reference, *arguments, **more):
    """No further from float64 than one step of the dtype, and what summing in float32 loses."""
    double = lambda t: t.double() if isinstance(t, torch.Tensor) else t
    exact = reference(*map(double, arguments), **{key: double(value) for key, value in more.items()})
    for one, right in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (ours, exact)), strict=True):
        assert one.dtype is arguments[0].dtype and one.shape == right.shape
        step = torch.finfo(one.dtype).eps * right.abs() + 1e-5 * right.abs().max()
        off = (one.double() - right).abs()
        assert (off <= step).all(), f"off by {off.max():.2e} of {right.abs().max():.2e}"


@pytest.fixture(params=["one kernel", "three"])
def norm_kernels(request, monkeypatch):
    """Both ways of `group_norm`, whatever the shape."""
    monkeypatch.setattr(group_norm, "WHOLE", 2**20 if request.param == "one kernel" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.usefixtures("norm_kernels")
def test_group_norm(device, dtype, shape, silu):
    x, channels = image(shape, dtype, device), shape[1]
    weight, bias = (random(channels, dtype, device) for _ in range(2))
    groups = 5 if channels % 32 else 32
    ours = group_norm.group_norm(x, groups, weight, bias, 1e-5, None, silu)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, group_norm.reference, x, groups, weight, bias, 1e-5, None, silu)


@pytest.mark.usefixtures("norm_kernels")
def test_group_norm_over_many_tiles(device):
    x, weight, bias = (image((1, 96, 40, 72), torch.bfloat16, device), *torch.randn(2, 96).bfloat16().to(device))
    assert_close(group_norm.group_norm(x, 32, weight, bias), group_norm.reference, x, 32, weight, bias)


@pytest.mark.parametrize("shape", [(60,), (3, 60)])
@pytest.mark.usefixtures("norm_kernels")
def test_group_norm_adds_a_shift_first(device, shape):
    x = image((3, 60, 5, 9), torch.bfloat16, device)
    weight, bias, shift = (random(s, torch.bfloat16, device) for s in (60, 60, shape))
    ours = group_norm.group_norm(x, 5, weight, bias, shift=shift)
    assert_close(ours, group_norm.reference, x, 5, weight, bias, shift=shift)


@pytest.mark.usefixtures("norm_kernels")
def test_group_norm_of_no_image(device):
    x, (weight, bias) = image((0, 60, 5, 7), torch.bfloat16, device), torch.randn(2, 60).bfloat16().to(device)
    assert group_norm.group_norm(x, 5, weight, bias, shift=weight.expand(0, 60)).shape == x.shape


@pytest.mark.usefixtures("norm_kernels")
def test_group_norm_of_numbers_far_from_zero_keeps_their_spread(device):
    x = image((1, 64, 24, 24), torch.float32, device, mean=1000.0)
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    ours = group_norm.group_norm(x, 32, weight, bias, silu=False)
    exact = group_norm.reference(x.double(), 32, weight.double(), bias.double(), silu=False)
    assert (ours.double() - exact).abs().max() < 1e-3, "a mean square less a squared mean would be off by a tenth"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 2 * 640), (5, 2 * 33), (1, 2)])
def test_geglu(device, dtype, shape):
    x = random(shape, dtype, device)
    assert_close(geglu.geglu(x), geglu.reference, x)


LARGE = (1100, 272)  # with 2,064 outputs several tiles a program, of several steps each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), [((2, 7, 72), 40), ((1030, 24), 2056), (LARGE, 2064), ((1, 8), 8), ((0, 8), 8)])
def test_linear_geglu(device, dtype, shape, outputs):
    """It rounds once where a layer and GEGLU after it do three times."""
    if device == "cpu" and shape == LARGE:
        pytest.skip("the interpreter takes a minute")
    x, weight = random(shape, dtype, device), random((2 * outputs, shape[-1]), dtype, device) / shape[-1] ** 0.5
    bias = random(2 * outputs, dtype, device)
    exact = linear_geglu.reference(x.double(), weight.double(), bias.double())
    off = lambda y: (y.double() - exact).square().sum().sqrt()
    ours = linear_geglu.linear_geglu(x, weight, bias)
    assert ours.dtype is dtype and ours.shape == exact.shape
    theirs = off(linear_geglu.reference(x, weight, bias)) + 1e-6 * exact.square().sum().sqrt()
    assert off(ours) <= (2 if device == "cpu" else 1.1) * theirs  # the interpreter truncates to bfloat16


@pytest.mark.parametrize(("shape", "outputs"), [((1030, 24), 72), (LARGE, 2064)])
def test_linear_geglu_by_narrow_tiles(device, shape, outputs, monkeypatch):
    if device == "cpu" and shape == LARGE:
        pytest.skip("the interpreter takes a minute")
    monkeypatch.setattr(linear_geglu, "GAINS", 0)
    assert linear_geglu.tile_of(shape[0], outputs, torch.bfloat16, torch.bfloat16, 2**17, 132)[:2] == linear_geglu.NARROW[:2]
    test_linear_geglu(device, torch.bfloat16, shape, outputs)


def test_a_tile_of_linear_geglu_is_narrow_where_large_ones_leave_multiprocessors_idle():
    wide = lambda *size, dtype=torch.half, programs=132: linear_geglu.tile_of(*size, dtype, dtype, 2**17, programs)[1]
    assert wide(1024, 5120, dtype=torch.float8_e4m3fn) == 64
    assert wide(1024, 5120) == 64, "320 tiles are two rounds of 132 and a third of 56; 640 are five, but for 20"
    assert [wide(2048, 5120), wide(4096, 2560), wide(8192, 2560), wide(1024, 5120, programs=1)] == [128] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(40, 24), (8, 72), (72,), (128, 64)], ids=str)
@pytest.mark.parametrize(("batch", "height", "width", "outputs"), [(2, 5, 7, 40), (1, 1, 1, 128), (3, 9, 11, 200), (0, 4, 4, 8)])
def test_shortcut(device, dtype, sizes, batch, height, width, outputs):
    """It rounds once where a convolution and two additions do three times."""
    image = lambda channels: random((batch, channels, height, width), dtype, device).to(**LAST)
    x, *beside = map(image, sizes)
    weight, bias = random((outputs, sum(sizes)), dtype, device) / sum(sizes) ** 0.5, random(outputs, dtype, device)
    residual = image(outputs)
    exact = shortcut.reference(*(t.double() for t in (x, weight, bias, residual, *beside)))
    ours = shortcut.shortcut(x, weight, bias, residual, *beside)
    assert ours.dtype is dtype and ours.shape == exact.shape and ours.is_contiguous(**LAST)
    off = lambda y: (y.double() - exact).square().sum().sqrt()
    theirs = off(shortcut.reference(x, weight, bias, residual, *beside)) + 1e-6 * exact.square().sum().sqrt()
    assert off(ours) <= (2 if device == "cpu" else 1.1) * theirs  # the interpreter truncates to bfloat16
    assert shortcut.fits(weight, x, *beside) or device == "cuda"


def test_two_images_whose_parts_of_a_shortcut_nearly_cancel(device):
    """And each part is beyond float16: the sum is not."""
    x, other = (torch.full((1, 16, 2, 2), n, device=device).half().to(**LAST) for n in (5000.0, -4999.0))
    weight, zeros = torch.ones(8, 32, device=device).half(), torch.zeros(1, 8, 2, 2, device=device).half().to(**LAST)
    ours = shortcut.shortcut(x, weight, torch.zeros(8, device=device).half(), zeros, other)
    exact = shortcut.reference(*(t.double() for t in (x, weight, torch.zeros(8, device=device), zeros, other)))
    assert (ours.double() - exact).abs().max() <= 2.0**-10 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_within_a_product_is_as_exact_as_its_dtype(device, dtype):
    """Values of one, gates from -20 to 20 and some far away: each result alone, not their root mean square."""
    z = torch.cat([torch.linspace(-20, 20, 1500), torch.tensor([0.0, 1e4, -1e4, 6e4, -6e4])]).to(device, dtype)
    x, weight, bias = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((len(z), 8), (16, 8), (16,)))
    x[:, 0], weight[8:, 0], bias[:8] = z, 1, 1
    ours, exact = linear_geglu.linear_geglu(x, weight, bias).double(), torch.nn.functional.gelu(z.double())[:, None]
    step = torch.finfo(dtype).eps * (1 if device == "cpu" else 0.5)  # the interpreter truncates to bfloat16
    allowed = 1.001 * step * exact.abs() + torch.finfo(dtype).smallest_normal * step + 7e-7 * (1 if dtype.itemsize == 2 else 5)
    assert ((ours - exact).abs() <= allowed).all()


def test_what_linear_geglu_is_made_for(monkeypatch):
    x, weight, bias = torch.zeros(2, 512, 16).half(), torch.zeros(32, 16).half(), torch.zeros(32).half()
    assert linear_geglu.fits(x, weight, bias) and linear_geglu.suits(1024, torch.device("cpu"))
    odd = torch.zeros(32 * 16 + 1).half()[1:].view(32, 16)
    assert not linear_geglu.fits(x, odd, bias), "weights at an address that is no multiple of 16 bytes"
    for capability, suits in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert linear_geglu.suits(1024, torch.device("cuda")) == suits
    assert not linear_geglu.fits(x[:, 1:].contiguous(), weight, bias), "few rows"
    assert not linear_geglu.fits(x[:, :, :12].contiguous(), weight[:, :12].contiguous(), bias), "rows of 24 bytes"
    assert not linear_geglu.fits(x, weight[:24], bias[:24]), "a result's rows of 24 bytes"
    assert not linear_geglu.fits(x, weight.T.contiguous().T, bias)
    assert not linear_geglu.fits(x.float(), weight.float(), bias.float())
    assert not linear_geglu.fits(x, weight.float(), bias) and not linear_geglu.fits(x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("added", [True, False])
def test_add_layer_norm(device, dtype, shape, added):
    x, residual = (random(shape, dtype, device) for _ in range(2))
    weight, bias = (random(shape[-1], dtype, device) for _ in range(2))
    residual = residual if added else None
    total, y = add_layer_norm.add_layer_norm(x, residual, weight, bias)
    assert_close(total, lambda x, residual: x if residual is None else x + residual, x, residual)
    # from the rounded sum, as the layer norm of two operations sees it
    assert_close((total, y), add_layer_norm.reference, total, None, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
def test_bias_residual(device, dtype, shape):
    x, residual = (image(shape, dtype, device) for _ in range(2))
    bias = random(shape[1], dtype, device)
    ours = bias_residual.bias_residual(x, bias, residual)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, bias_residual.reference, x, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), [((2, 8, 4, 5), 12), ((3, 33, 3, 7), 70), ((1, 16, 1, 1), 16)])
def test_upsample_conv(device, dtype, shape, outputs):
    """It rounds three times where the operations it stands for do once: sums of weights, the four cases, the result."""
    x = image(shape, dtype, device)
    weight, bias = random((outputs, shape[1], 3, 3), dtype, device), random(outputs, dtype, device)
    exact = upsample_conv.reference(x.double(), weight.double(), bias.double())
    off = lambda y: (y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    theirs = off(upsample_conv.reference(x, weight, bias))
    for kept in (None, upsample_conv.folded(weight)):
        ours = upsample_conv.upsample_conv(x, weight, bias, kept)
        assert ours.dtype is dtype and ours.is_contiguous(memory_format=torch.channels_last)
        assert off(ours) <= 2.5 * theirs + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "tokens", "heads", "width"), [(70, 77, 2, 64), (5, 154, 3, 24), (1, 1, 1, 8), (64, 256, 1, 3), (0, 7, 1, 8)]
)
@pytest.mark.parametrize("joined", [False, True])
def test_prompt_attention(device, dtype, positions, tokens, heads, width, joined):
    """No further from float64 than PyTorch's own attention, by a rounding; keys and values also as halves of longer rows."""
    q = random((2, positions, heads * width), dtype, device, mean=1.0)
    both = random((2, tokens, 2 * heads * width), dtype, device)
    k, v = both.chunk(2, -1) if joined else (part.contiguous() for part in both.chunk(2, -1))
    ours = prompt_attention.prompt_attention(q, k, v, heads)
    exact = prompt_attention.reference(q.double(), k.double(), v.double(), heads)
    off = lambda y: (y.double() - exact).square().sum().sqrt()
    assert ours.dtype is dtype and ours.shape == q.shape and ours.isfinite().all()
    step = torch.finfo(dtype).eps * exact.square().sum().sqrt()
    assert off(ours) <= 1.1 * off(prompt_attention.reference(q, k, v, heads)) + step + 1e-6 * exact.abs().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(2, 256, 2, 64), (3, 70, 3, 16), (1, 129, 1, 128), (2, 1, 2, 32), (1, 0, 1, 64)]
)
def test_self_attention(device, dtype, batch, tokens, heads, width):
    """No further from float64 than PyTorch's own attention, by a rounding; keys far apart, so that the largest is met late."""
    qkv = random((batch, tokens, 3 * heads * width), torch.float32, device)
    qkv[:, :, : 2 * heads * width] *= torch.linspace(0.3, 2, max(tokens, 1), device=device)[:tokens, None]
    qkv = qkv.to(dtype)
    ours = self_attention.self_attention(qkv, heads)
    exact = self_attention.reference(qkv.double(), heads)
    off = lambda y: (y.double() - exact).square().sum().sqrt()
    assert ours.dtype is dtype and ours.shape == (batch, tokens, heads * width) and ours.isfinite().all()
    step = torch.finfo(dtype).eps * exact.square().sum().sqrt()
    assert off(ours) <= 1.1 * off(self_attention.reference(qkv, heads)) + step + 1e-6 * exact.abs().sum()


def test_self_attention_is_for_few_queries_of_its_width_in_16_bits(monkeypatch):
    new = lambda batch, tokens, joined, dtype=torch.half: torch.empty(batch, tokens, joined, dtype=dtype)
    sdxl = [new(1, 1024, 3840), new(2, 1024, 3840), new(1, 4096, 1920), new(2, 4096, 1920)]
    assert [self_attention.fits(qkv, qkv.shape[-1] // 192) for qkv in sdxl] == [True, True, True, False]
    assert not self_attention.fits(new(1, 4096, 3 * 320), 8), "heads of 40"
    assert not self_attention.fits(new(1, 16, 192, torch.float), 1)
    assert not self_attention.fits(new(1, 16, 384)[..., :192], 1) and self_attention.fits(new(1, 16, 192), 1)
    assert not self_attention.takes(new(1, 1, 1 + 16 * 192).flatten()[1:].view(1, 16, 192), 1), "moved by two bytes"
    assert not self_attention.takes(new(1, 16, 192, torch.int16), 1)
    monkeypatch.setattr(self_attention.launch, "fetches_tiles", lambda device: False)
    assert not self_attention.takes(new(1, 16, 192), 1), "an older GPU"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 640), (3, 33), (1, 2, 5000), (1, 16384), (2, 20000), (1, 1), ()])
def test_softmax(device, dtype, shape):
    """Scores far apart, and over all of them far from zero."""
    scores = 30 * random(shape, torch.float32, device) - 1000
    ours = softmax.softmax(scores, 0.5, dtype)
    exact = softmax.reference(scores.double(), 0.5, torch.float64)
    assert ours.dtype is dtype and ours.isfinite().all()
    # half precision has smallest numbers, too
    off = torch.finfo(dtype).eps * exact + 1e-6 + torch.finfo(dtype).smallest_normal
    assert ((ours.double() - exact).abs() <= off).all()


def test_bytes_are_counted():
    x = torch.empty(2, 64, 8, 8, dtype=torch.bfloat16)
    assert bias_residual.bytes_moved(x) == 3 * 2 * x.numel()
    assert group_norm.bytes_moved(x, 32) == 2 * 2 * x.numel(), "one program keeps a group"
    large = torch.empty(1, 64, 128, 256, dtype=torch.bfloat16)
    assert group_norm.bytes_moved(large, 32) == 3 * 2 * large.numel()
    assert geglu.bytes_moved(x) == 3 * x.numel()
    assert linear_geglu.bytes_moved(torch.empty(3, 5), torch.empty(16, 5)) == 4 * (15 + 80 + 24)
    assert prompt_attention.bytes_moved(x, torch.empty(6), torch.empty(6)) == 2 * (2 * x.numel() + 12)
    assert self_attention.bytes_moved(torch.empty(2, 5, 6, dtype=torch.half)) == 2 * 4 * 20
    assert softmax.bytes_moved(torch.empty(3, 5), 1.0, torch.bfloat16) == 6 * 15
    assert upsample_conv.bytes_moved(x, torch.empty(32, 64, 3, 3)) == 2 * (3 * x.numel() + 32 * 64 * 9)
    assert add_layer_norm.bytes_moved(x, x) == 8 * x.numel() == 2 * add_layer_norm.bytes_moved(x, None)


def test_few_keys_are_as_many_as_a_program_can_hold():
    keys = lambda tokens, width, dtype: torch.empty(1, tokens, 2 * width, dtype=dtype)
    held = [(128, 128, torch.half), (256, 64, torch.half), (77, 160, torch.half), (77, 64, torch.float), (77, 80, torch.float)]
    assert [prompt_attention.fits(keys(*size), 2) for size in held] == [True, True, False, True, False]


LAST = {"memory_format": torch.channels_last}
WRONG = {
    "not channels_last": (
        lambda: group_norm.group_norm(torch.ones(1, 8, 4, 4), 4, torch.ones(8), torch.ones(8)),
        "channels_last",
    ),
    "groups": (
        lambda: group_norm.group_norm(torch.ones(1, 8, 4, 4).to(**LAST), 3, torch.ones(8), torch.ones(8)),
        "3 groups",
    ),
    "weight": (
        lambda: group_norm.group_norm(torch.ones(1, 8, 4, 4).to(**LAST), 4, torch.ones(7), torch.ones(8)),
        "weight has",
    ),
    "dtype": (lambda: geglu.geglu(torch.ones(4, 8, dtype=torch.float64)), "not float64"),
    "odd": (lambda: geglu.geglu(torch.ones(4, 7)), "even last dimension"),
    "strided": (lambda: geglu.geglu(torch.ones(8, 4).T), "not contiguous"),
    "residual": (
        lambda: add_layer_norm.add_layer_norm(torch.ones(4, 8), torch.ones(4, 9), torch.ones(8), torch.ones(8)),
        "residual has shape",
    ),
    "window": (
        lambda: upsample_conv.upsample_conv(torch.ones(1, 8, 4, 4).to(**LAST), torch.ones(8, 8, 1, 1), torch.ones(8)),
        "8, 3, 3. was expected",
    ),
    "too many tokens": (
        lambda: prompt_attention.prompt_attention(torch.ones(1, 4, 8), *[torch.ones(1, 257, 8)] * 2, 2),
        "257 tokens and 2 heads .* too much",
    ),
    "heads": (
        lambda: prompt_attention.prompt_attention(torch.ones(1, 4, 8), *[torch.ones(1, 7, 8)] * 2, 3),
        "3 heads of 8 numbers are none",
    ),
    "values": (
        lambda: prompt_attention.prompt_attention(torch.ones(1, 4, 8), torch.ones(1, 7, 8), torch.ones(1, 6, 8), 2),
        "v is not .1, 7, 8.",
    ),
    "no three": (lambda: self_attention.self_attention(torch.ones(1, 4, 64), 1), "not .batch, tokens, 3 . 1 heads of 16, 32"),
    "no head": (lambda: self_attention.self_attention(torch.ones(1, 4, 48), 0), "3 . 0 heads"),
    "three tensors": (lambda: self_attention.self_attention(torch.ones(4, 48), 1), "4, 48. is not"),
    "scales a row": (lambda: self_attention.self_attention(torch.ones(1, 4, 48), 1, "row"), "finds no scales of its own, as 'row'"),
    "scales a row of a product": (
        lambda: linear_geglu.linear_geglu(torch.ones(4, 16), torch.ones(32, 16), torch.ones(32), "row"),
        "linear_geglu finds no scales",
    ),
    "scales a row of a prompt": (
        lambda: prompt_attention.prompt_attention(torch.ones(1, 4, 8), *[torch.ones(1, 7, 8)] * 2, 2, "row"),
        "prompt_attention finds no scales",
    ),
    "scales a row of an image": (
        lambda: group_norm.group_norm(torch.ones(1, 8, 4, 4).to(**LAST), 4, torch.ones(8), torch.ones(8), scale="row"),
        "group_norm finds no scales",
    ),
    "moved": (lambda: self_attention.self_attention(torch.ones(1 + 192)[1:].view(1, 4, 48), 1), "multiple of 16 bytes"),
    "two dtypes": (
        lambda: linear_geglu.linear_geglu(torch.ones(4, 8), torch.ones(16, 8).half(), torch.ones(16)),
        "make them one",
    ),
    "two sizes": (
        lambda: shortcut.shortcut(
            *(torch.ones(s).to(**LAST) if len(s) == 4 else torch.ones(s) for s in ((1, 8, 4, 4), (8, 16), (8,), (1, 8, 4, 5), (1, 8, 4, 4)))
        ),
        "do not fit a residual",
    ),
    "odd channels": (
        lambda: shortcut.shortcut(torch.ones(1, 7, 4, 4).to(**LAST), torch.ones(8, 7), torch.ones(8), torch.ones(1, 8, 4, 4).to(**LAST)),
        "rows of 7 and 8 channels do not begin",
    ),
    "rows": (lambda: linear_geglu.linear_geglu(torch.ones(4, 7), torch.ones(16, 7), torch.ones(16)), "16 bytes"),
    "bias": (lambda: linear_geglu.linear_geglu(torch.ones(4, 8), torch.ones(16, 8), torch.ones(8)), "bias has shape"),
    "too long": (
        lambda: add_layer_norm.add_layer_norm(torch.ones(1, 2**15), None, *[torch.ones(2**15)] * 2),
        "1 to 16384",
    ),
    "other image": (
        lambda: bias_residual.bias_residual(
            *(torch.ones(s).to(**LAST) if len(s) == 4 else torch.ones(s) for s in ((1, 8, 4, 4), (8,), (1, 8, 4, 5)))
        ),
        "residual has shape",
    ),
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU is there, and Triton compiles for it")
@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_what_a_kernel_cannot_take_is_told_in_one_line(call, said):
    with pytest.raises(UserError, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_a_cpu_without_the_interpreter_is_told_of_it():
    code = "import torch; from sdopt.kernels import geglu; geglu.geglu(torch.ones(2, 4))"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "geglu needs a CUDA GPU; TRITON_INTERPRET=1" in ended.stderr.strip().splitlines()[-1]


class Noted:
    """A kernel that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, grid):
        return lambda *given, **settings: self.asked.append(("started", grid, given, settings))

    def warmup(self, *given, grid, **settings):
        self.asked.append(("compiled", grid, given, settings))
        return self

    @property
    def run(self):
        self.asked.append("loaded")


def test_kernels_are_compiled_ahead_and_not_started_then(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # none
    kernel = Noted()
    start = lambda: launch.start(kernel, (2,), "x", num_warps=4)
    launch.compile_ahead(lambda: [start(), start()])
    start()
    compiled, started = ((way, (2,), ("x",), {"num_warps": 4}) for way in ("compiled", "started"))
    assert kernel.asked == [compiled, compiled, "loaded", started]
    with pytest.raises(ZeroDivisionError):
        launch.compile_ahead(lambda: 1 / 0)
    launch.start(kernel, (1,))
    assert kernel.asked[-1][0] == "started", "afterwards, whatever happened"


@pytest.mark.gpu
def test_gpu_a_kernel_is_compiled_ahead_by_a_thread_and_computes_then(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.randn(7, 2 * 3, device="cuda")  # a tile that no other test compiles
    launch.compile_ahead(lambda: geglu.geglu(x))
    compiled = sorted(tmp_path.rglob("*.*"))
    assert any(path.suffix == ".cubin" for path in compiled)
    assert_close(geglu.geglu(x), geglu.reference, x)
    assert sorted(tmp_path.rglob("*.*")) == compiled, "not once more, nor the C function that starts it"
