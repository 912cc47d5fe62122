"""What a block has to be made of, so that `fused` can compute it: what it holds beside that is diffusers' own to know."""

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

WIDEST = 256  # channels of a head that fused attention kernels take
UPS = {kind: kind.forward for kind in (CrossAttnUpBlock2D, UpBlock2D)}
REPLACED = {"forward", "_conv_forward"}  # what a module's own dict holds if somebody has put another there


def is_stock(*modules, kind=None):
    """Whether the modules, whose weights are read here without calling them, are PyTorch's own and nobody listens."""
    for module in modules:
        if kind and type(module) is not kind:
            return False
        if module._forward_hooks or module._forward_pre_hooks or REPLACED & vars(module).keys():
            return False
    return True


def convolution(conv):
    """Whether `conv` is a convolution of which weight, stride and padding say all."""
    return (
        is_stock(conv, kind=nn.Conv2d)
        and (conv.padding_mode == "zeros" and conv.groups == 1)
        and set(conv.dilation) == {1}
    )


def resnet(block):
    """Whether `block` is the residual block that is computed here."""
    convolutions = [block.conv1, block.conv2, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
    return (
        type(block) is ResnetBlock2D  # another's class can be put in its place at any time
        and all(map(convolution, convolutions))
        and is_stock(block.norm1, block.norm2, kind=nn.GroupNorm)
        and is_stock(block.nonlinearity, block.dropout)
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
        and None not in (block.conv1.bias, block.conv2.bias)
        and (block.time_emb_proj is None or block.time_emb_proj.bias is not None)
    )


def up(block):
    """Whether `block` is what goes up again in a UNet, with no FreeU to weigh its skip connections."""
    freeu = any(getattr(block, factor, None) is not None for factor in ("s1", "s2", "b1", "b2"))
    return UPS.get(type(block)) is type(block).forward and not freeu


def upsample(block):
    """Whether `block` is the doubling that is computed here."""
    conv = getattr(block, "conv", None)
    return (
        type(block) is Upsample2D
        and convolution(conv)
        and (block.interpolate and block.norm is None)
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and conv.bias is not None
    )


def transformer(model):
    """Whether `model` and its blocks are those that are computed here."""
    ends = (model.proj_in, model.proj_out)
    return (
        type(model) is Transformer2DModel
        and model.is_input_continuous
        and not model.training
        and is_stock(model.norm, kind=nn.GroupNorm)
        and (model.use_linear_projection or is_stock(*ends, kind=nn.Conv2d))
        and all(map(transformer_block, model.transformer_blocks))
    )


def ends(model):
    """(the last layer of the last block of `model`, the projection after it) if both are products with a bias, or None."""
    pair = model.transformer_blocks[-1].ff.net[2], model.proj_out
    known = is_stock(*pair) and type(pair[0]) is nn.Linear and type(pair[1]) in (nn.Linear, nn.Conv2d)
    return pair if known and None not in (pair[0].bias, pair[1].bias) else None


def transformer_block(block):
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        type(block) is BasicTransformerBlock
        and is_stock(block)
        and block.norm_type == "layer_norm"
        and is_stock(*norms, kind=nn.LayerNorm)
        and all(n.weight is not None and n.bias is not None for n in norms)
        and block.pos_embed is None
        and not block.only_cross_attention
        and block.attn2 is not None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and type(block.ff.net[0]) is GEGLU
        and len(block.ff.net) == 3
        and is_stock(block.ff, *list(block.ff.net)[:2])
    )


def attention(attn):
    """Whether `attn` is the layer that is computed here: scaled dot products of its own projections, and no more."""
    return (
        type(attn) is Attention
        and is_stock(attn, *list(attn.to_out)[1:])
        and type(attn.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0)
        and all(part is None for part in (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k))
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def joinable(attn):
    """Whether `attn`, a self-attention, takes its query, key and value from three products without a bias."""
    parts = (attn.to_q, attn.to_k, attn.to_v)
    return (
        attention(attn)
        and type(attn.processor) is AttnProcessor2_0
        and is_stock(*parts, kind=nn.Linear)
        and all(part.bias is None for part in parts)
    )


def wide_attention(attn):
    """Whether `attn` is the layer of a VAE that is computed here; with a narrower head PyTorch's own way is better."""
    return (
        type(attn) is Attention
        and attn.inner_dim > WIDEST
        and is_stock(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], kind=nn.Linear)
        and is_stock(attn.group_norm, kind=nn.GroupNorm)
        and not attn.training
        and type(attn.processor) is AttnProcessor2_0
        and (attn.heads, attn.rescale_output_factor, attn.residual_connection) == (1, 1, True)
        and attn.to_q.out_features == attn.to_v.out_features == attn.to_q.in_features
        and all(part is None for part in (attn.spatial_norm, attn.norm_q, attn.norm_k))
    )
