"""Answers to the exercises of 05_fused_qkv, and mistakes that are often made."""

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import Linear


def fuse(layers):
    biased = layers[0].bias is not None
    fused = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=biased)
    fused.weight.data = torch.cat([layer.weight.data for layer in layers])
    if biased:
        fused.bias.data = torch.cat([layer.bias.data for layer in layers])
    return fused


def extra_bytes(unet):
    total = 0
    for attn in unet.modules():
        if isinstance(attn, Attention):
            stacked = [attn.to_k, attn.to_v] + ([] if attn.is_cross_attention else [attn.to_q])
            total += sum(layer.weight.nbytes for layer in stacked)
    return total


def without_biases(layers):
    fused = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
    fused.weight.data = torch.cat([layer.weight.data for layer in layers])
    return fused


def reversed_order(layers):
    return fuse(layers[::-1])


def query_everywhere(unet):
    found = [attn for attn in unet.modules() if isinstance(attn, Attention)]
    return sum(layer.weight.nbytes for attn in found for layer in (attn.to_q, attn.to_k, attn.to_v))


def four_bytes_a_number(unet):
    found = [attn for attn in unet.modules() if isinstance(attn, Attention)]
    return 4 * sum(
        layer.weight.numel()
        for attn in found
        for layer in ([attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v])
    )


# 5.2: a block makes 3 + 3 products before; after, one for self-attention and two (q, kv) for cross-attention. 70 * (6 - 3).
ANSWERS = {"05.1": fuse, "05.2": 210, "05.3": extra_bytes}

MISTAKES = {
    "05.1": [without_biases, reversed_order, lambda layers: torch.cat([layer.weight for layer in layers]), 3],
    "05.2": [280, 420, 140, "210"],  # cross-attention cannot stack its query; all of them; one attention a block
    "05.3": [query_everywhere, four_bytes_a_number, lambda unet: None],
}
