"""Exercises of notebooks/05_fused_qkv."""

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import Linear

from sdopt import models
from sdopt.exercises import number


def _fuse(answer):
    for bias in (False, True):
        layers = [Linear(24, outputs, bias=bias) for outputs in (24, 24, 40)]
        x = torch.randn(5, 24)
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        fused = answer(layers)
        if not isinstance(fused, Linear):
            return f"return a torch.nn.Linear, not {type(fused).__name__}"
        if (fused.in_features, fused.out_features) != (24, 88):
            return (
                f"24 inputs to 24, 24 and 40 outputs make a layer of 24 to 88, yours is {fused.in_features} to "
                f"{fused.out_features}"
            )
        if (fused.weight.shape, fused.bias is not None) != ((88, 24), bias):
            return f"layers {'with' if bias else 'without'} biases should give one {'with' if bias else 'without'}"
        if not torch.allclose(fused(x), expected, atol=1e-5):
            return (
                f"its outputs are not those of the layers side by side (layers {'with' if bias else 'without'} biases)"
            )
    return None


def _fewer(answer):
    return number(
        answer, 210, 210,
        "count one block first: how many products do q, k, v take in each of its two attentions, before and after?",
        "products",
    )  # fmt: skip


def _extra_bytes(answer):
    unet = models.load("pocket").unet
    for dtype in (torch.float32, torch.bfloat16):
        unet.to(dtype)
        said = answer(unet)
        right = sum(_stacked(part) for part in unet.modules() if isinstance(part, Attention))
        if wrong := number(said, right, right, _hint(said, right, dtype), "bytes"):
            return wrong
    return None


def _stacked(attn):
    parts = (attn.to_k, attn.to_v) if attn.is_cross_attention else (attn.to_q, attn.to_k, attn.to_v)
    return sum(part.weight.nbytes for part in parts)


def _hint(said, right, dtype):
    too = "many" if isinstance(said, int | float) and said > right else "few"
    return f"too {too} for pocket's UNet in {str(dtype)[6:]}: which weights are stacked in each kind, and how large is a number?"


EXERCISES = {"05.1": _fuse, "05.2": _fewer, "05.3": _extra_bytes}
