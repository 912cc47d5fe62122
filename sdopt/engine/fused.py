"""The blocks of a UNet and a VAE as they are computed with the fused kernels: functions of diffusers' own modules.

The modules keep their weights, their names and their places; only how a block is computed changes, one instance at a time.
What a block is made of is looked at in every call, since a LoRA, a hook or another attention processor can be put in at any
time: a block that holds what is not known here is computed by diffusers' own code, as before.
"""

from types import MethodType

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention, silu

from sdopt.engine import once
from sdopt.kernels import launch
from sdopt.kernels.add_layer_norm import add_layer_norm
from sdopt.kernels.bias_residual import bias_residual
from sdopt.kernels.geglu import geglu
from sdopt.kernels.group_norm import group_norm
from sdopt.kernels.upsample_conv import upsample_conv


def fuse(model: nn.Module) -> int:
    """Compute the blocks of `model` (a UNet, a ControlNet, a VAE) with the fused kernels; returns how many there are.

    Its weights stay where they are; `release` undoes it. Blocks whose `forward` somebody has replaced already are left
    alone. Twice is once.
    """
    for module in list(model.modules()):
        if type(module) in FORWARDS and "forward" not in vars(module):
            module.forward = MethodType(FORWARDS[type(module)], module)
        _End.fuse(getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None))
    return sum(is_fused(m) for m in model.modules())


def release(model: nn.Module):
    """Let all blocks of `model` be computed by diffusers' own code again."""
    for block in model.modules():
        if is_ours(block):
            del block.forward


def is_ours(module: nn.Module) -> bool:
    """Whether the module's `forward` was put there by `fuse`."""
    return is_fused(module) or _End.has(module)


def is_fused(block: nn.Module) -> bool:
    """Whether `fuse` has taken this block."""
    forward = vars(block).get("forward")
    return type(block) in FORWARDS and getattr(forward, "__func__", None) is FORWARDS[type(block)]


def resnet(block, x, temb=None, *args, **kwargs):
    """`ResnetBlock2D.forward`: two convolutions, each with the norm before it; their biases are added by other kernels."""
    if args or kwargs or (temb is None) != (block.time_emb_proj is None) or not is_plain_resnet(block) or not _suits(x):
        return type(block).forward(block, x, temb, *args, **kwargs)
    x = x.contiguous(memory_format=torch.channels_last)
    h = _convolved(block.conv1, _normed(block.norm1, x))
    shift = once.shift(block, temb)
    if shift is None:
        shift = block.conv1.bias
        if block.time_emb_proj is not None:
            shift = shift + block.time_emb_proj(silu(temb))
    h = _convolved(block.conv2, _normed(block.norm2, h, shift=shift))
    bias = block.conv2.bias
    if block.conv_shortcut is not None:
        x = _convolved(block.conv_shortcut, x)
        if block.conv_shortcut.bias is not None:
            bias = bias + block.conv_shortcut.bias
    return bias_residual(h, bias, x)


def upsample(block, x, output_size=None, *args, **kwargs):
    """`Upsample2D.forward` to twice the size, with a convolution."""
    doubled = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
    if args or kwargs or not doubled or not is_plain_upsample(block) or not _suits(x):
        return type(block).forward(block, x, output_size, *args, **kwargs)
    x = x.contiguous(memory_format=torch.channels_last)
    return upsample_conv(x, block.conv.weight, block.conv.bias, once.quarters(block))


def transformer(model, hidden_states, encoder_hidden_states=None, *args, return_dict=True, **kwargs):
    """`Transformer2DModel.forward` of an image: every residual is added by the layer norm after it."""
    asked = [value for key, value in kwargs.items() if key != "timestep"]  # its blocks have no use for a timestep
    if args or any(value is not None for value in asked) or not (is_plain_transformer(model) and _suits(hidden_states)):
        return type(model).forward(
            model, hidden_states, encoder_hidden_states, *args, return_dict=return_dict, **kwargs
        )
    x = hidden_states.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    tokens = _normed(model.norm, x, activation=False).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    h, pending = _projected(model.proj_in, tokens), None
    for block in model.transformer_blocks:
        h, pending = _transformer_block(block, h, pending, encoder_hidden_states)
    h = _projected(model.proj_out, h + pending)
    out = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + x
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _transformer_block(block, h, pending, text):
    """(residual, what is still to be added to it) after a block, from the same before it."""
    h, n = _added(h, pending, block.norm1)
    h, n = _added(_attended(block.attn1, n, None), h, block.norm2)
    h, n = _added(_attended(block.attn2, n, text), h, block.norm3)
    return h, block.ff.net[2](geglu(block.ff.net[0].proj(n)))


def _attended(attn, x, text):
    if not is_plain_attention(attn):
        return attn(x, encoder_hidden_states=text)
    if type(attn.processor) is FusedAttnProcessor2_0 and text is None:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q = attn.to_q(x)
        k, v = once.keys_and_values(attn) or keys_and_values(attn, x if text is None else text)
    q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def keys_and_values(attn, seen):
    """What attention layer `attn` makes of what it looks at: two tensors [batch, tokens, channels]."""
    if type(attn.processor) is FusedAttnProcessor2_0 and attn.is_cross_attention:
        return attn.to_kv(seen).chunk(2, dim=-1)
    return attn.to_k(seen), attn.to_v(seen)


def _suits(x):
    """Whether the kernels can take `x`: they have no gradients, and run where Triton does."""
    return not torch.is_grad_enabled() and (x.is_cuda or launch.INTERPRETED) and x.dtype in launch.FLOATS


class _End:
    """A model's last norm and the SiLU after it, two modules, as one kernel: the norm does both."""

    def __init__(self, norm, act):
        self.pair = norm, act
        norm.forward, act.forward = self.normed, self.passed_on

    @classmethod
    def fuse(cls, norm, act):
        """Make one of the two, if they are what is known here."""
        if (
            type(norm) is nn.GroupNorm
            and type(act) is nn.SiLU
            and not {"forward"} & (vars(norm).keys() | vars(act).keys())
        ):
            cls(norm, act)

    @classmethod
    def has(cls, module):
        """Whether `module` is one of such a pair."""
        return isinstance(getattr(vars(module).get("forward"), "__self__", None), cls)

    def fits(self, x):
        return _suits(x) and not any(part._forward_hooks or part._forward_pre_hooks for part in self.pair)

    def normed(self, x):
        norm = self.pair[0]
        if not self.fits(x):
            return nn.GroupNorm.forward(norm, x)
        return _normed(norm, x.contiguous(memory_format=torch.channels_last))

    def passed_on(self, x):
        return x if self.fits(x) else nn.SiLU.forward(self.pair[1], x)


def _normed(norm, x, activation=True, shift=None):
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, activation)


def _added(x, residual, norm):
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def _convolved(conv, x):
    """Without its bias."""
    return conv2d(x, conv.weight, None, conv.stride, conv.padding).contiguous(memory_format=torch.channels_last)


def _projected(layer, tokens):
    """A linear layer, or the 1x1 convolution that stands for one."""
    return linear(tokens, layer.weight.flatten(1), layer.bias) if isinstance(layer, nn.Conv2d) else layer(tokens)


def _is_stock(*modules, kind=None):
    """Whether the modules, whose weights are read here without calling them, are PyTorch's own and nobody listens."""
    for module in modules:
        if kind and type(module) is not kind:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    return True


def is_plain_resnet(block):
    """Whether `block` is the residual block that is computed here."""
    convolutions = [block.conv1, block.conv2, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
    return (
        _is_stock(*convolutions, kind=nn.Conv2d)
        and _is_stock(block.norm1, block.norm2, kind=nn.GroupNorm)
        and not block.training
        and (block.upsample is None and block.downsample is None)
        # what a VAE calls "group" is a norm without an embedding, as "default" is where there is none
        and (
            block.time_embedding_norm == "default"
            or (block.time_embedding_norm == "group" and block.time_emb_proj is None)
        )
        and not block.skip_time_act
        and type(block.nonlinearity) is nn.SiLU
        and block.output_scale_factor == 1
        and all(c.padding_mode == "zeros" and c.groups == 1 and set(c.dilation) == {1} for c in convolutions)
        and None not in (block.conv1.bias, block.conv2.bias)
    )


def is_plain_upsample(block):
    """Whether `block` is the doubling that is computed here."""
    conv = getattr(block, "conv", None)
    return (
        _is_stock(conv, kind=nn.Conv2d)
        and (block.interpolate and block.norm is None)
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding_mode == "zeros" and conv.groups == 1 and set(conv.dilation) == {1})
        and conv.bias is not None
    )


def is_plain_transformer(model):
    """Whether `model` and its blocks are those that are computed here."""
    ends = (model.proj_in, model.proj_out)
    return (
        model.is_input_continuous
        and not model.training
        and _is_stock(model.norm, kind=nn.GroupNorm)
        and (model.use_linear_projection or _is_stock(*ends, kind=nn.Conv2d))
        and all(map(_is_plain_block, model.transformer_blocks))
    )


def _is_plain_block(block):
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        type(block) is BasicTransformerBlock
        and _is_stock(block)
        and block.norm_type == "layer_norm"
        and _is_stock(*norms, kind=nn.LayerNorm)
        and all(n.weight is not None and n.bias is not None for n in norms)
        and block.pos_embed is None
        and not block.only_cross_attention
        and block.attn2 is not None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and type(block.ff.net[0]) is GEGLU
        and _is_stock(block.ff, block.ff.net[0])
        and len(block.ff.net) == 3
    )


def is_plain_attention(attn):
    """Whether `attn` is the layer that is computed here: scaled dot products of its own projections, and no more."""
    return (
        type(attn) is Attention
        and _is_stock(attn)
        and type(attn.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0)
        and all(part is None for part in (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k))
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


FORWARDS = {ResnetBlock2D: resnet, Transformer2DModel: transformer, Upsample2D: upsample}
