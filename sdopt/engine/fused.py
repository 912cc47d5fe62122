"""The blocks of a UNet and a VAE as they are computed with the fused kernels: functions of diffusers' own modules.

The modules keep their weights, their names and their places; only how a block is computed changes, one instance at a time.
What a block is made of is looked at in every call, since a LoRA, a hook or another attention processor can be put in at any
time: a block that holds what is not known here is computed by diffusers' own code, as before.
"""

from types import MethodType

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from sdopt.engine import once, plain
from sdopt.engine.residual import normed, resnet, suits, up, upsample
from sdopt.kernels.add_layer_norm import add_layer_norm
from sdopt.kernels.geglu import geglu
from sdopt.kernels.linear_geglu import fits as joins
from sdopt.kernels.linear_geglu import linear_geglu
from sdopt.kernels.linear_geglu import suits as suits_joined
from sdopt.kernels.prompt_attention import fits, prompt_attention
from sdopt.kernels.self_attention import fits as fast
from sdopt.kernels.self_attention import self_attention, takes
from sdopt.kernels.softmax import softmax

SCORES = 2**26  # of attention at once: 256 MiB in float32


def fuse(model: nn.Module) -> int:
    """Compute the blocks of `model` (a UNet, a ControlNet, a VAE) with the fused kernels; returns how many there are.

    Its weights stay where they are; `release` undoes it. Blocks whose `forward` somebody has replaced already are left
    alone. Twice is once. Introduced in notebooks/11_fused_kernels.
    """
    for module in list(model.modules()):
        if (forward := _forward_for(module)) and "forward" not in vars(module):
            module.forward = MethodType(forward, module)
        _End.fuse(getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None))
    return sum(is_fused(m) for m in model.modules())


def release(model: nn.Module):
    """Let all blocks of `model` be computed by diffusers' own code again."""
    for block in model.modules():
        if _function(block) in OURS or _End.has(block):
            del block.forward


def is_ours(module: nn.Module) -> bool:
    """Whether the module's `forward` was put there by `fuse`, for the class that the module still has."""
    return is_fused(module) or _End.has(module)


def is_fused(block: nn.Module) -> bool:
    """Whether `fuse` has taken this block, and nobody has put another class in its class's place."""
    return (forward := _function(block)) is not None and forward is _forward_for(block)


def transformer(model, hidden_states, encoder_hidden_states=None, *args, return_dict=True, **kwargs):
    """`Transformer2DModel.forward` of an image: every residual is added by the layer norm after it."""
    asked = [value for key, value in kwargs.items() if key != "timestep"]  # its blocks have no use for a timestep
    if args or any(value is not None for value in asked) or not (plain.transformer(model) and suits(hidden_states)):
        return type(model).forward(
            model, hidden_states, encoder_hidden_states, *args, return_dict=return_dict, **kwargs
        )
    x = hidden_states.contiguous(memory_format=torch.channels_last)
    h, last = _projected(model.proj_in, _tokens(model.norm, x)), None
    for block in model.transformer_blocks:
        h, *last = _transformer_block(block, h, last and last[0](last[1]), encoder_hidden_states)
    out = _added_to(x, _ended(model, h, *last))
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def wide_attention(attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
    """`Attention.forward` over an image's positions with one wide head, as a VAE has: too wide for the fused kernels.

    In two products and a softmax, for as many positions at once as give SCORES.
    """
    asked = [encoder_hidden_states, attention_mask, *kwargs.values()]
    if any(value is not None for value in asked) or not plain.wide_attention(attn) or not (x.ndim == 4 and suits(x)):
        return type(attn).forward(attn, x, encoder_hidden_states, attention_mask, **kwargs)
    x = x.contiguous(memory_format=torch.channels_last)
    tokens = _tokens(attn.group_norm, x)
    batch, positions, channels = tokens.shape
    q, k, v = attn.to_q(tokens), attn.to_k(tokens).transpose(1, 2), attn.to_v(tokens)
    rows = max(1, SCORES // (batch * positions))
    weights = (softmax(_exact_product(some, k), channels**-0.5, x.dtype) for some in q.split(rows, 1))
    return _added_to(x, attn.to_out[0](torch.cat([w @ v for w in weights], 1)))


def _exact_product(a, b):
    """A batch of products as it was summed, in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _transformer_block(block, h, pending, text):
    """What is to be summed after a block: its residual, and its last layer of the tensor that comes third.

    From the same two summands, `h` and `pending`, before it.
    """
    layers = block.attn1, block.attn2, block.ff.net[0].proj, block.ff.net[2]
    rows = h.shape[:-1].numel()
    own, cross, wide, narrow = (_rounded(layer, rows) for layer in layers)
    h, n = _added(h, pending, block.norm1, own)
    h, n = _added(_attended(block.attn1, n, None, own), h, block.norm2, cross)
    h, n = _added(_attended(block.attn2, n, text, cross), h, block.norm3, wide)
    return h, narrow or layers[3], _gated(wide, narrow, layers[2], n, rows)


def _gated(wide, narrow, layer, x, rows):
    """The first half of a feed-forward, `layer` and GEGLU; `wide`, `narrow`: what stands for it and the second half in e4m3."""
    if wide and narrow and wide.can_gate and not narrow.by_row and suits_joined(rows, wide.weight.values.device):
        return wide.gated(x, narrow.takes)
    if not (wide or narrow) and plain.is_stock(layer, kind=nn.Linear) and joins(x, layer.weight, layer.bias):
        return linear_geglu(x, layer.weight, layer.bias)
    return geglu((wide or layer)(x), narrow and narrow.takes)


def _ended(model, h, layer, gated):
    """The projection after a model's blocks, of the sum of `h` and the last block's last `layer`.

    Where that layer's bias is in the projection's, a product adds itself to `h`, which nothing else needs: no sum apart.
    """
    bias = once.bias_after(model, layer)
    if bias is None:
        return _projected(model.proj_out, h + layer(gated))
    h.flatten(0, 1).addmm_(gated.flatten(0, 1), layer.weight.t())
    return linear(h, model.proj_out.weight.flatten(1), bias)


def _rounded(layer, rows):
    """What stands for a layer in e4m3, or None."""
    return None if isinstance(layer, Attention) and not plain.attention(layer) else once.rounded(layer, rows)


def _attended(attn, x, text, rounded=None):
    """What layer `attn` makes of `x` and the prompt `text`, None for itself; `rounded`: its projections of `x` in e4m3."""
    if not plain.attention(attn):
        return attn(x, encoder_hidden_states=text)
    qkv = _joined(attn, x, rounded) if text is None else None
    if qkv is not None:
        out = once.rounded(attn.to_out[0], qkv.shape[:-1].numel())
        if fast(qkv, attn.heads) or out and out.every and takes(qkv, attn.heads):
            return (out or attn.to_out[0])(self_attention(qkv, attn.heads, out and out.takes))
        q, k, v = qkv.chunk(3, dim=-1)
    else:
        q = (rounded or attn.to_q)(x)
        k, v, *scale = once.keys_and_values(attn) or keys_and_values(attn, x if text is None else text)
        if text is not None and fits(k, attn.heads):
            out = once.rounded(attn.to_out[0], q.shape[:-1].numel()) if scale else None
            return (out or attn.to_out[0])(prompt_attention(q, k, v, attn.heads, *(scale if out else ())))
    q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _joined(attn, x, rounded):
    """Query, key and value of a self-attention side by side, as one product of `x` makes them; None where there is none."""
    if rounded:
        return rounded(x)
    if type(attn.processor) is FusedAttnProcessor2_0:
        return attn.to_qkv(x)
    weights = once.joined(attn)
    return None if weights is None else linear(x, weights)


def keys_and_values(attn, seen):
    """What attention layer `attn` makes of what it looks at: two tensors [batch, tokens, channels]."""
    if type(attn.processor) is FusedAttnProcessor2_0 and attn.is_cross_attention:
        return attn.to_kv(seen).chunk(2, dim=-1)
    return attn.to_k(seen), attn.to_v(seen)


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
        return suits(x) and not any(part._forward_hooks or part._forward_pre_hooks for part in self.pair)

    def normed(self, x):
        norm = self.pair[0]
        if not self.fits(x):
            return nn.GroupNorm.forward(norm, x)
        return normed(norm, x.contiguous(memory_format=torch.channels_last))

    def passed_on(self, x):
        return x if self.fits(x) else nn.SiLU.forward(self.pair[1], x)


def _tokens(norm, x):
    """An image's positions, normalised, one after the other: [batch, positions, channels]."""
    return normed(norm, x, activation=False).permute(0, 2, 3, 1).flatten(1, 2)


def _added_to(x, tokens):
    """The image `x` and what its positions became."""
    return tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2) + x


def _added(x, residual, norm, rounded=None):
    """The sum, and its norm; in e4m3 where the layer after it takes that."""
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, rounded and rounded.takes)


def _projected(layer, tokens):
    """A linear layer, or the 1x1 convolution that stands for one."""
    return linear(tokens, layer.weight.flatten(1), layer.bias) if isinstance(layer, nn.Conv2d) else layer(tokens)


def _function(module):
    """The function behind a `forward` that is this module's alone, or None."""
    return getattr(vars(module).get("forward"), "__func__", None)


def _forward_for(module):
    """The function that computes `module` here, or None."""
    if type(module) is Attention and module.group_norm is not None:
        return wide_attention
    return FORWARDS.get(type(module))


FORWARDS = {ResnetBlock2D: resnet, Transformer2DModel: transformer, Upsample2D: upsample} | dict.fromkeys(plain.UPS, up)
OURS = {wide_attention, *FORWARDS.values()}
