"""Step 6: int8 matrix products by torchao, and which layers gain from them. The only file that imports torchao."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sdopt.errors import UserError
from sdopt.timing import compiled_parts

SMALLEST = 64


@dataclass(frozen=True)
class Rule:
    """Layers left as they are, and why. `covers(name, parent, inputs, outputs)`: does the rule cover this layer?"""

    name: str
    reason: str
    covers: Callable[[str, nn.Module, int, int], bool]


@dataclass(frozen=True)
class Layer:
    """One linear layer or 1x1 convolution: its place, its size, and the rule that leaves it as it is (None: int8)."""

    model: str
    name: str
    inputs: int
    outputs: int
    convolution: bool
    rule: Rule | None

    @property
    def quantised(self) -> bool:
        return self.rule is None


def _unused(name, parent, inputs, outputs):
    last = name.rsplit(".", 1)[-1]
    fused = isinstance(parent, Attention) and parent.fused_projections
    return fused and (last in ("to_k", "to_v") or (last == "to_q" and not parent.is_cross_attention))


def _has(*parts):
    return lambda name, parent, inputs, outputs: any(part in name for part in parts)


def _shape(*shapes):
    return lambda name, parent, inputs, outputs: (inputs, outputs) in shapes


IMPOSSIBLE = (
    Rule("unused", "an original that fused projections left behind: it is never called", _unused),
    Rule(
        "time embedding",
        "one row a sample: nothing to win, and int8 products on a GPU need more than 16 rows",
        _has("time_emb", "add_embedding", "class_embedding"),
    ),
)
ALWAYS = IMPOSSIBLE + (
    Rule(
        "shortcut",
        "the 1x1 convolution around a residual block: the tutorial found none of SDXL's to gain",
        _has("conv_shortcut"),
    ),
)
# For any model. The product saves inputs * outputs a row, rounding its input costs `inputs`, rescaling its output
# `outputs`: the smaller of the two is how often the cost is paid back.
GENERAL = ALWAYS + (
    Rule("prompt", "keys and values of the prompt: a few dozen rows", _has("attn2.to_k", "attn2.to_v", "attn2.add_")),
    Rule(
        "small",
        f"fewer than {SMALLEST} inputs or outputs: rounding and rescaling cost what the product saves",
        lambda name, parent, inputs, outputs: min(inputs, outputs) < SMALLEST,
    ),
)
FAINTEST = 1e-12  # what the largest number of a row counts for at least
SIXTEENS = Rule(
    "no multiple of 16",
    "fp8 products take no other sizes",
    lambda name, parent, inputs, outputs: bool(inputs % 16 or outputs % 16),
)
# For Stable Diffusion XL: the shapes that diffusers' tutorial found on an A100 not to gain. The VAE decoder has no
# others and stays in half precision; the tutorial makes its one shortcut of 128 channels a linear layer all the same.
SDXL = ALWAYS + (
    Rule("prompt", "keys and values of the prompt: 77 rows a sample", _shape((2048, 640), (2048, 1280), (2048, 2560))),
    Rule(
        "640 wide",
        "the outer blocks' attention and feed-forward: 640 inputs do not pay back the rounding",
        _shape((640, 640), (640, 1920), (640, 5120)),
    ),
    Rule("decoder", "the VAE's one attention block, called once a picture", _shape((512, 512), (512, 1536))),
)


# For GPUs of compute capability 9.0 (H100, H200): figures/data/nvidia-h200/kernels.json has no layer of pocket's or SDXL's
# sizes that gains, since products in 16 bits are as fast there as products of whole numbers.
HOPPER = Rule(
    "this GPU",
    "its 16-bit products are as fast as its int8 products, so that no size pays back the rounding",
    lambda name, parent, inputs, outputs: True,
)


def rules(pipe, anyway: bool = False, every: bool = False) -> tuple[Rule, ...]:
    """The rules for this pipeline: SDXL where the UNet is Stable Diffusion XL's, GENERAL for any other.

    HOPPER goes with them where the pipeline is on such a GPU, unless int8 is wanted `anyway`: to measure it, or for
    the memory it saves. With `every` layer wanted, IMPOSSIBLE alone: to see what the filter spares a picture.
    """
    if every:
        return IMPOSSIBLE
    config = pipe.unet.config
    sdxl = list(config.block_out_channels) == [320, 640, 1280] and config.cross_attention_dim == 2048
    chosen = SDXL if sdxl else GENERAL
    return chosen if anyway or not gains_nowhere(pipe.unet.device) else (*chosen, HOPPER)


def gains_nowhere(device) -> bool:
    """Whether no layer gains from int8 on `device`: a GPU of compute capability 9.0. Introduced in notebooks/06_int8."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def has_fp8(device) -> bool:
    """Whether `device` multiplies 8-bit floats: a GPU of compute capability 8.9 or later. Introduced in notebooks/13_fp8."""
    device = torch.device(device)
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device) >= (8, 9)


def explain(pipe, anyway: bool = False, every: bool = False) -> list[Layer]:
    """Every linear layer and 1x1 convolution of UNet and VAE decoder, with the rule that spares it from int8, if any.

    `anyway` and `every` as in `int8`. The same before and after it. Introduced in notebooks/06_int8.
    """
    return _explained(pipe, rules(pipe, anyway, every))


def _explained(pipe, chosen):
    layers = []
    for model, root in _models(pipe).items():
        for path, module in root.named_modules():
            convolution = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
            if not convolution and not isinstance(module, nn.Linear):
                continue
            outputs, inputs = module.weight.shape[:2]
            name = path.removesuffix(".mod")  # where a convolution was made a linear layer
            parent = root.get_submodule(name.rpartition(".")[0])
            rule = next((rule for rule in chosen if rule.covers(name, parent, inputs, outputs)), None)
            layers.append(Layer(model, name, inputs, outputs, convolution or name != path, rule))
    return layers


def int8(pipe, anyway: bool = False, every: bool = False):
    """Step 6: int8 weights, and inputs rounded to int8 as they come, in the layers `explain` marks; returns `pipe`.

    Weights: one scale an output channel. Inputs: one scale a row, found anew at every call ("dynamic"). 1x1
    convolutions among the layers become linear layers first. Eager it is slower: rounding must be fused to pay, so
    compile next. Where no layer gains (see `gains_nowhere`) it changes nothing, unless told to `anyway`; with `every`
    layer, the filter is left out.
    Raises UserError when the pipeline is compiled already.
    Source: diffusers' "Accelerate inference" tutorial; https://github.com/pytorch/ao. Introduced in notebooks/06_int8.
    """
    _check_not_compiled(pipe, "int8")
    return _quantised(pipe, explain(pipe, anyway, every), _dynamic_int8(), "Int8Tensor")


def torchao_fp8(pipe):
    """torchao's own fp8, to measure the engine's beside it; returns `pipe`. Eager it is slower: compile next.

    Weights in e4m3 with a scale an output, inputs rounded to it at every call with a scale a row, in the layers that
    GENERAL leaves, of sizes the product takes. A row of zeros, as SDXL's empty prompt makes them, needs a bound below: torchao
    0.18 divides it by its largest number (pytorch/ao issue 4713), and the picture is lost. Raises UserError when the pipeline is compiled already, is not in bfloat16,
    or where the GPU has no fp8. Source: https://github.com/pytorch/ao.
    """
    _check_not_compiled(pipe, "fp8")
    if not has_fp8(pipe.unet.device):
        raise UserError("fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper): leave the pipeline as it is")
    if pipe.unet.dtype is not torch.bfloat16:
        raise UserError(f"torchao's fp8 is for bfloat16, the UNet is in {str(pipe.unet.dtype)[6:]}: convert it first")
    quantization = _torchao()
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), activation_value_lb=FAINTEST, set_inductor_config=False
    )
    return _quantised(pipe, _explained(pipe, (*GENERAL, SIXTEENS)), config, "Float8Tensor")


def _check_not_compiled(pipe, step):
    if any(compiled_parts(model) for model in _models(pipe).values()):
        raise UserError(f"a compiled pipeline cannot be quantised: load it again and apply {step} before compile")


def _quantised(pipe, layers, config, kind):
    """`pipe`, torchao's `config` applied to those of `layers` that no rule spares; their weights become a `kind`."""
    quantization = _torchao()
    for model, root in _models(pipe).items():
        chosen = {layer.name for layer in layers if layer.model == model and layer.quantised}
        quantization.swap_conv2d_1x1_to_linear(root, lambda part, name: isinstance(part, nn.Conv2d) and name in chosen)
        quantization.quantize_(
            root,
            config,
            lambda part, name: (
                isinstance(part, nn.Linear)
                and name.removesuffix(".mod") in chosen
                and type(part.weight).__name__ != kind
            ),
        )
    return pipe


def int8_layers(pipe) -> int:
    """How many layers of UNet and VAE decoder are in int8."""
    return _count(pipe, "Int8Tensor")


def torchao_fp8_layers(pipe) -> int:
    """How many layers of UNet and VAE decoder are in torchao's fp8."""
    return _count(pipe, "Float8Tensor")


def _count(pipe, kind):
    parts = (part for model in _models(pipe).values() for part in model.modules() if isinstance(part, nn.Linear))
    return sum(type(part.weight).__name__ == kind for part in parts)


# Linear layers, inputs by outputs, that diffusers' tutorial found on an A100 not to gain from int8.
TUTORIAL_SPARES = {
    *((1280, 640), (1920, 1280), (1920, 640), (2048, 1280), (2048, 2560), (2560, 1280), (256, 128), (2816, 1280)),
    *((320, 640), (512, 1536), (512, 256), (512, 512), (640, 1280), (640, 1920), (640, 320), (640, 5120), (640, 640)),
    *((960, 320), (960, 640)),
}


def tutorial_int8(pipe):
    """diffusers' tutorial's own int8, to measure ours beside it: its filter, on UNet and VAE whole; returns `pipe`.

    1x1 convolutions of 128 inputs or outputs become linear layers; then every linear layer of more than 16 inputs
    that is not in TUTORIAL_SPARES. Left out, since today's int8 products on a GPU need more than 16 rows: the time
    embeddings, which have one a sample.
    Source: https://huggingface.co/docs/diffusers/tutorials/fast_diffusion. Introduced in notebooks/06_int8.
    """
    quantization = _torchao()

    def is_128_wide(part, name):
        one_by_one = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
        return one_by_one and 128 in (part.in_channels, part.out_channels)

    def is_taken(part, name):
        few_rows = any(word in name for word in ("time_emb", "add_embedding"))
        wide = isinstance(part, nn.Linear) and part.in_features > 16
        return wide and not few_rows and (part.in_features, part.out_features) not in TUTORIAL_SPARES

    for model in (pipe.unet, pipe.vae):
        quantization.swap_conv2d_1x1_to_linear(model, is_128_wide)
        quantization.quantize_(model, _dynamic_int8(), is_taken)
    return pipe


def int8_layer(layer: nn.Linear) -> nn.Linear:
    """One linear layer in dynamic int8, in place, whatever its size; returns it. Introduced in notebooks/06_int8."""
    _torchao().quantize_(layer, _dynamic_int8())
    return layer


def _dynamic_int8():
    # its own Inductor settings would be set as globals, for every later compilation in the process
    return _torchao().Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _models(pipe):
    return {"unet": pipe.unet, "vae": pipe.vae.decoder}


def _torchao():
    if not torch.cuda.is_available():
        # its CUDA kernels cannot load here, and it would warn of each
        os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    # once a process, to torchao's authors: a cache of the compiler could know int8 weights better than it does
    warnings.filterwarnings("ignore", message="Int8Tensor does not implement _stable_hash_for_caching")
    import torchao.quantization

    return torchao.quantization
