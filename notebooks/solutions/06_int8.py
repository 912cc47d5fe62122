"""Answers to the exercises of 06_int8, and mistakes that are often made."""

import torch


def quantise(w):
    scale = w.abs().amax(1, keepdim=True) / 127
    safe = torch.where(scale == 0, 1.0, scale)
    return torch.round(w / safe).to(torch.int8), scale


def spared(layers):
    total = {}
    for layer in layers:
        if layer.rule is not None:
            total[layer.rule.name] = total.get(layer.rule.name, 0) + layer.inputs * layer.outputs
    return total


def one_scale(w):
    scale = (w.abs().max() / 127).expand(len(w), 1)
    return torch.round(w / scale).to(torch.int8), scale


def cut_off(w):
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (w / scale).to(torch.int8), scale  # a cast cuts towards zero


def overflowing(w):
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 255
    return torch.round(w / scale).to(torch.int8), scale  # 255 does not fit into int8, it wraps around


def without_zeros(w):
    scale = w.abs().amax(1, keepdim=True) / 127
    return torch.round(w / scale).to(torch.int8), scale * (scale / scale)  # 0 / 0


def by_count(layers):
    names = [layer.rule.name for layer in layers if layer.rule is not None]
    return {name: names.count(name) for name in names}


def with_int8(layers):
    total = spared(layers)
    total["int8"] = sum(layer.inputs * layer.outputs for layer in layers if layer.quantised)
    return total


# 6.2: 127 steps reach 32, so a step is 32 / 127 = 0.252 long, and 1 / 0.252 = 3.97 of them fit between 0 and 1.
ANSWERS = {"06.1": quantise, "06.2": 4, "06.3": spared}

MISTAKES = {
    "06.1": [one_scale, cut_off, overflowing, without_zeros, lambda w: w],
    "06.2": [127, 8, 32, 0, "4"],  # as if there were no outlier; 256 / 32; the outlier; nothing left; a text
    "06.3": [by_count, with_int8, lambda layers: sum(layer.inputs * layer.outputs for layer in layers if layer.rule)],
}
