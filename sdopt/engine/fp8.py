"""Linear layers and convolutions in e4m3: which of a UNet's, their weights as rounded, and their product.

A layer is taken where the kernel before it writes e4m3 at no further pass: a layer norm (query, key and value of a
self-attention as one product, the query of a cross-attention, a feed-forward's first half), GEGLU (its second half), attention
(its output, of a self-attention where that is `self_attention`'s), or a group norm (the two 3x3 convolutions of a residual block).
That is all that the linear layers of a transformer block compute at every step; the projections around a model's blocks and the
convolutions between blocks would need a pass of their own, and stay as they are. So does attention itself.

Products of linear layers are torch._scaled_mm's, but for a feed-forward's first half, which `linear_geglu` computes with the
GEGLU after it where both halves are taken. Convolutions are `conv_float8`'s.

Scales of inputs are a row's own, found by the kernel that writes it; or, with one a tensor, a bound that follows from the
weights: what a layer norm can give at most, and GEGLU of its linear layer. So nothing is calibrated, nothing saturates, and no
picture depends on those before it. Some inputs have such a bound for a scale in either case, and the weights they meet one scale:
what GEGLU gives, and attention, which is a mean of values (a batch's prompts' own largest, or what a layer norm and the values'
weights can give), for no program of `linear_geglu`, `prompt_attention` or `self_attention` sees a whole row; a cross-attention's
query, whose product by scales a row is no faster than in bfloat16; and a convolution's, which sums positions that must then have
one. That the bound is tens or hundreds of times what is common costs little: e4m3 is a float, and keeps its three bits down to
2**-15 of the bound.

The convolutions, the gated first half and `self_attention` are for Hopper: on other GPUs they stay as they are, or are gated
apart.

What torch._scaled_mm takes (PyTorch 2.11, aten/src/ATen/native/cuda/ScaledBlas.cpp): [M, K] row-major by [K, N] column-major,
K and N multiples of 16, M any; float32 scales, either [M, 1] and [1, N], a scale a row and an output, or one number each, and no
mix of the two; a bias in the result's dtype. Both are cuBLAS's on compute capability 9.0 with CUDA 12.9 or later. Elsewhere
scales a row are a CUTLASS kernel's, which copies them first when M is no multiple of 256. With `use_fast_accum` a tensor core's
own sums, of fewer bits than float32, run through a whole product; without, they are added up in float32 on the way.

Memory: a byte a weight beside the bfloat16 ones, which stay for whoever changes them (for SDXL 1.8 GB of linear layers and
0.3 GB of convolutions, less 0.6 GB of joined projections that this spares).
"""

from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdopt.engine import bounds, plain
from sdopt.errors import UserError, first_line
from sdopt.kernels import launch, self_attention
from sdopt.kernels.conv_float8 import conv_float8, flat
from sdopt.kernels.linear_geglu import linear_geglu
from sdopt.kernels.to_float8 import CAPABILITY, E4M3, Scaled, to_float8

SCALES, FILTERS = ("row", "tensor"), ("measured", "all")
DTYPE, MULTIPLE = torch.bfloat16, 16
# Multiplications of a product, rows * inputs * outputs, from which on it is faster in e4m3, by its scales: what makes the layers
# of the sweep fp8-shapes fastest in sum, as recorded on an H200; and of a convolution, positions * 9 * inputs * outputs.
FEWEST, FEWEST_OF_CONVOLUTION = {"row": 2**31, "tensor": 2**26}, 2**32


@dataclass(frozen=True)
class Rounding:
    """What `engine.prepare` was asked for: one scale a row and output or one a tensor; the layers that gain or all."""

    scales: str
    filter: str


def asked(precision: str | None, scales: str, filter: str) -> Rounding | None:
    """The words of `engine.prepare` as a `Rounding`, None for none; raises UserError for a word that is unknown."""
    words = {"precision": (precision, (None, "fp8")), "scales": (scales, SCALES), "filter": (filter, FILTERS)}
    for name, (word, known) in words.items():
        if word not in known:
            raise UserError(f"unknown {name} {word!r}: use {' or '.join(map(repr, known))}")
    if not precision and (scales, filter) != (SCALES[0], FILTERS[0]):
        raise UserError("scales and filter are for precision='fp8': give that, too, or leave them out")
    return Rounding(scales, filter) if precision else None


def check(unet: nn.Module, rounding: Rounding):
    """Raise UserError unless `unet` can be rounded where it is."""
    found = torch.cuda.get_device_capability(unet.device)
    if found < CAPABILITY:
        raise UserError(
            f"fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), this one has {found[0]}.{found[1]}: "
            "leave precision out"
        )
    check_dtype(unet, "pipeline")
    try:
        new = lambda shape, dtype=torch.float32: torch.zeros(shape, device=unet.device).to(dtype)
        for scale in {(), (32, 1) if rounding.scales == "row" else ()}:
            few = Scaled(new((32, 32), E4M3), new(scale))
            product(few, few, new(32, DTYPE))
    except (RuntimeError, AttributeError) as error:  # such as a scale a row on compute capability 12.0: pytorch issue 192707
        raise UserError(
            f"this PyTorch has no fp8 product with scales='{rounding.scales}' for this GPU: {first_line(error)}"
        ) from error


def check_dtype(unet: nn.Module, of: str):
    """Raise UserError unless `unet` is in bfloat16; `of`: what the message says is not."""
    if unet.dtype is not DTYPE:
        raise UserError(f"fp8 is for a {of} in bfloat16, this one is in {str(unet.dtype)[6:]}: half_precision(pipe) first")


def pays(rows: int, inputs: int, outputs: int, scales: str = "row") -> bool:
    """Whether a product of that size is faster in e4m3, rounding included. Introduced in notebooks/13_fp8."""
    return rows * inputs * outputs >= FEWEST[scales]


def product(x: Scaled, weight: Scaled, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., K] by [N, K], both in e4m3 with their scales: [..., N] in bfloat16, the bias added.

    Introduced in notebooks/13_fp8.
    """
    out = torch._scaled_mm(
        *(x.values.view(-1, x.values.shape[-1]), weight.values.t(), x.scale, weight.scale.t()),
        bias=bias,
        out_dtype=DTYPE,
        use_fast_accum=True,
    )
    return out.view(*x.values.shape[:-1], len(weight.values))


class Layer:
    """What stands for linear layers of one input, `parts`, in e4m3: called with a `Scaled` input, the outputs in a row.

    `takes`: the scales its input has to come with, as the kernels take them: "row", or one for all. `after`: what a bound of its
    input follows from, a place of `bounds.of_each`; both None where only what is before it can tell. `whole`: input and weights
    have one scale even where the others have a scale a row. `every`: it is taken whatever it gains.
    """

    used = False

    def __init__(self, parts, after, rounding, whole=False):
        self.parts, self.after, self.every = parts, after, rounding.filter == "all"
        self.sizes, device = [part.out_features for part in parts], parts[0].weight.device
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, device=device, dtype=dtype)
        self.by_row = rounding.scales == "row" and not whole
        values = new(sum(self.sizes), parts[0].in_features, dtype=E4M3)
        self.weight = Scaled(values, new(len(values), 1) if self.by_row else new())
        self.bounded = not self.by_row and after is not None
        self.takes = "row" if self.by_row else new() if self.bounded else None
        self.can_gate = parts[0].bias is not None

    def __call__(self, x: Scaled) -> torch.Tensor:
        self.used = True
        return product(x, self.weight, self.parts[0].bias)

    def gated(self, x: Scaled, takes: torch.Tensor) -> Scaled:
        """GEGLU of what it makes of `x`, in one kernel, by the one scale that the layer after it `takes`."""
        self.used = True
        return linear_geglu(x, self.weight, self.parts[0].bias, takes)

    def pays(self, rows: int) -> bool:
        """Whether it is worth it for so many rows."""
        return self.every or pays(rows, *self.weight.values.T.shape, "row" if self.by_row else "tensor")

    def round(self):
        """Write the weights as they are now in e4m3; by the one scale, where they have one."""
        scale = self.weight.scale.split(self.sizes) if self.by_row else [self.weight.scale] * len(self.parts)
        for part, *out in zip(self.parts, self.weight.values.split(self.sizes), scale):
            to_float8(part.weight, "row" if self.by_row else self.weight.scale, Scaled(*out))


class Convolution:
    """What stands for the 3x3 convolution `conv` in e4m3: called with the `Scaled` image that `norm` before it has written.

    `takes`: the scale that the norm is to write it with.
    """

    used, by_row, bounded = False, True, True

    def __init__(self, conv, norm, rounding):
        self.conv, self.after, self.every = conv, (norm,), rounding.filter == "all"
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, device=conv.weight.device, dtype=dtype)
        outputs = conv.out_channels
        self.weight, self.takes = Scaled(new(outputs, 9 * conv.in_channels, dtype=E4M3), new(outputs, 1)), new()

    def __call__(self, x: Scaled) -> torch.Tensor:
        self.used = True
        return conv_float8(x, self.weight)

    def pays(self, rows: int) -> bool:
        """Whether it is worth it for so many positions."""
        outputs, inputs = self.weight.values.shape
        fast = rows * inputs * outputs >= FEWEST_OF_CONVOLUTION and launch.fetches_tiles(self.weight.values.device)
        return self.every or fast

    def round(self):
        """Write the weights as they are now in e4m3."""
        to_float8(flat(self.conv.weight), out=self.weight)


def gather(layers):
    """Round the weights of `layers` as they are now, and bound their inputs by what is before: for all of them at once."""
    if whole := [layer for layer in layers if not layer.by_row]:  # parts of one input share a scale, by the largest of theirs
        most = max(len(layer.parts) for layer in whole)
        of_part = [layer.parts[min(n, len(layer.parts) - 1)] for layer in whole for n in range(most)]
        apart = list(dict.fromkeys(of_part))
        largest = dict(zip(apart, bounds.of_all([part.weight for part in apart])))
        _put([layer.weight.scale for layer in whole], torch.stack([largest[part] for part in of_part]).view(-1, most).amax(1))
    if bounded := [layer for layer in layers if layer.bounded]:
        _put([layer.takes for layer in bounded], torch.stack(bounds.of_each([layer.after for layer in bounded])))
    for layer in layers:
        layer.round()


def _put(scales, largest):
    torch._foreach_copy_(scales, list(bounds.scale_of(largest)))


def every_layer(unet: nn.Module, scales: str) -> dict[nn.Module, Layer | Convolution]:
    """The `layers` of a whole UNet, of blocks that the engine computes, whatever they gain. Raises UserError for other scales."""
    blocks = [block for part in unet.modules() for block in getattr(part, "transformer_blocks", ())]
    blocks = [block for block in blocks if plain.transformer_block(block)]
    resnets = [part for part in unet.modules() if type(part) is ResnetBlock2D and plain.resnet(part)]
    return layers(blocks, asked("fp8", scales, "all"), resnets)


def layers(blocks, rounding: Rounding | None, resnets=()) -> dict[nn.Module, Layer | Convolution]:
    """{module: its `Layer`} of transformer blocks: of those parts that are PyTorch's own, or merged with their LoRA.

    And the `Convolution`s of residual blocks, `resnets`, that are computed by `fused`.
    """
    found = {}
    for block in resnets if rounding else ():
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            if _fits_convolution(conv):
                found[conv] = Convolution(conv, norm, rounding)
    for block in blocks if rounding else ():
        wide, narrow = block.ff.net[0].proj, block.ff.net[2]
        bounded = plain.is_stock(_merged(wide), kind=nn.Linear)  # GEGLU, by weights alone
        cross = plain.attention(block.attn2)
        seen = _values(block.attn1, rounding)
        places = {
            block.attn1: (_projections(block.attn1), (block.norm1,)),
            block.attn2: ([block.attn2.to_q] if cross else [], (block.norm2,)),  # by row no faster than in bfloat16
            block.attn2.to_out[0]: ([block.attn2.to_out[0]] if cross else [], None),
            wide: ([wide], (block.norm3,)),
            narrow: ([narrow] if bounded or rounding.scales == "row" else [], (block.norm3, _merged(wide))),
            block.attn1.to_out[0]: ([block.attn1.to_out[0]] if seen else [], (block.norm1, *seen)),
        }
        for place, (parts, after) in places.items():
            parts = [_merged(part) for part in parts]
            if parts and all(map(_fits, parts)) and (len(parts) == 1 or all(part.bias is None for part in parts)):
                gated = place is narrow and wide in found and found[wide].can_gate
                attended = place in (block.attn2, block.attn1.to_out[0]) or not after
                found[place] = Layer(parts, after, rounding, gated or attended)
    return found


def _projections(attn):
    if not plain.attention(attn):
        return []
    return [attn.to_qkv] if type(attn.processor) is FusedAttnProcessor2_0 else [attn.to_q, attn.to_k, attn.to_v]


def _values(attn, rounding):
    """(linear layer, the first of its outputs) that give `attn` its values; () where `self_attention` is not for it."""
    parts, widths = _projections(attn), self_attention.WIDTHS if rounding.filter == "all" else (self_attention.FAST,)
    if not parts or attn.inner_dim // attn.heads not in widths:
        return ()
    last = _merged(parts[-1])
    known = plain.is_stock(last, kind=nn.Linear) and last.bias is None and launch.fetches_tiles(last.weight.device)
    return (last, 0 if len(parts) == 3 else 2 * attn.inner_dim) if known else ()


def _merged(part):
    """The linear layer that peft's layer stands for while its LoRAs are merged into the weights; any other as it is."""
    return part.base_layer if getattr(part, "merged_adapters", None) and not part.disable_adapters else part


def _fits(part):
    return (
        plain.is_stock(part, kind=nn.Linear)
        and part.weight.dtype is DTYPE
        and (part.bias is None or part.bias.dtype is DTYPE)
        and part.weight.is_contiguous()
        and not (part.in_features % MULTIPLE or part.out_features % MULTIPLE)
    )


def _fits_convolution(conv):
    return (
        (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and conv.weight.dtype is DTYPE
        and conv.in_channels % MULTIPLE == 0
    )
