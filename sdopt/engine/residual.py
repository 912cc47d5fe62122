"""The convolutional blocks of a UNet and a VAE as they are computed with the fused kernels: see `fused`."""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.functional import conv2d, silu
from torch.nn.modules import module

from sdopt.engine import once, plain
from sdopt.kernels import launch
from sdopt.kernels.bias_residual import bias_residual
from sdopt.kernels.group_norm import group_norm
from sdopt.kernels.shortcut import fits, shortcut
from sdopt.kernels.upsample_conv import upsample_conv

EVERYWHERE = (module._global_forward_hooks, module._global_forward_pre_hooks)  # of those who listen to every module


def resnet(block, x, temb=None, *args, **kwargs):
    """`ResnetBlock2D.forward`: two convolutions, each with the norm before it; their biases are added by other kernels.

    `x`: an image, or from `up` two, an image and its skip connection, whose channels come one after the other.
    """
    images = x if isinstance(x, tuple) else (x,)
    timed = (temb is None) == (block.time_emb_proj is None)
    if args or kwargs or not timed or not plain.resnet(block) or not all(map(suits, images)):
        return type(block).forward(block, torch.cat(x, 1) if len(images) > 1 else x, temb, *args, **kwargs)
    x, *beside = (image.contiguous(memory_format=torch.channels_last) for image in images)
    h = _normed_and_convolved(block.norm1, block.conv1, x, None, *beside)
    shift = once.shift(block, temb)
    if shift is None:
        shift = block.conv1.bias
        if block.time_emb_proj is not None:
            shift = shift + block.time_emb_proj(silu(temb))
    h = _normed_and_convolved(block.norm2, block.conv2, h, shift)
    bias, narrow = once.bias_of_end(block), block.conv_shortcut
    if narrow is not None and _is_one(narrow, x, *beside):
        return shortcut(x, narrow.weight.flatten(1), bias, h, *beside)
    both = torch.cat((x, *beside), 1) if beside else x
    return bias_residual(h, bias, both if narrow is None else _convolved(narrow, both))


def up(block, hidden_states, res_hidden_states_tuple, temb=None, *args, **kwargs):
    """`CrossAttnUpBlock2D.forward` and `UpBlock2D.forward`: an image and its skip connection stay where they are."""
    attentions = getattr(block, "attentions", None)
    asked = any(kwargs.get(key) for key in ("cross_attention_kwargs", "scale"))  # what warns that it is not used
    if args or asked or not plain.up(block) or torch.is_grad_enabled():
        return type(block).forward(block, hidden_states, res_hidden_states_tuple, temb, *args, **kwargs)
    x, size = hidden_states, kwargs.pop("upsample_size", None)
    for n, part in enumerate(block.resnets if attentions is None else block.resnets[: len(attentions)]):
        pair = x, res_hidden_states_tuple[-1 - n]
        x = part(pair if _takes_two(part) and x.dtype == pair[1].dtype else torch.cat(pair, 1), temb)
        if attentions is not None:
            x = attentions[n](x, return_dict=False, **kwargs)[0]
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


def _takes_two(part):
    """Whether a residual block may be given two images: it is `resnet` that gets them, and nobody listens."""
    ours = type(part) is ResnetBlock2D and getattr(vars(part).get("forward"), "__func__", None) is resnet
    return ours and not any((part._forward_hooks, part._forward_pre_hooks, *EVERYWHERE))


def _is_one(conv, *images):
    """Whether a shortcut and the end of its block are one kernel."""
    alike = (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
    return alike and conv.weight.flatten(1).is_contiguous() and fits(conv.weight, *images)


def upsample(block, x, output_size=None, *args, **kwargs):
    """`Upsample2D.forward` to twice the size, with a convolution."""
    doubled = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
    if args or kwargs or not doubled or not plain.upsample(block) or not suits(x):
        return type(block).forward(block, x, output_size, *args, **kwargs)
    x = x.contiguous(memory_format=torch.channels_last)
    return upsample_conv(x, block.conv.weight, block.conv.bias, once.quarters(block))


def suits(x):
    """Whether the kernels can take `x`: they have no gradients, autocast does not know them, and they run where Triton does."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return (x.is_cuda or launch.INTERPRETED) and x.dtype in launch.FLOATS


def normed(norm, x, activation=True, shift=None, scale=None, beside=None):
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, activation, scale, beside)


def _normed_and_convolved(norm, conv, x, shift=None, beside=None):
    """A norm of `x` and `shift`, SiLU, and the convolution after it without its bias; in e4m3 where it stands in that."""
    in_e4m3 = once.rounded(conv, x.numel() // x.shape[1])
    if in_e4m3:
        return in_e4m3(normed(norm, x, shift=shift, scale=in_e4m3.takes, beside=beside))
    return _convolved(conv, normed(norm, x, shift=shift, beside=beside))


def _convolved(conv, x):
    """Without its bias."""
    return conv2d(x, conv.weight, None, conv.stride, conv.padding).contiguous(memory_format=torch.channels_last)
