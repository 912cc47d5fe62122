"""Answers to the exercises of 01_baseline_fp32, and mistakes that are often made."""

import torch


def to_tf32(x):
    # Half of the last kept bit, added as an integer, carries into it where the cut part is half or more.
    return ((x.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def cut(x):
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def overflowing(q, k, v):
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


# 01.1: (768 / 8) ** 2 positions, squared, times 2 * 8 matrices, 4 bytes each.
ANSWERS = {"01.1": 2 * 8 * ((768 // 8) ** 2) ** 2 * 4 / 2**30, "01.2": to_tf32, "01.3": attend}

MISTAKES = {
    "01.1": [8 * 9216**2 * 4 / 2**30, 2 * 8 * 9216 * 4 / 2**30, 2 * 8 * 9216**2 * 4 / 1e9, 1.0],
    "01.2": [cut, lambda x: x.half().float(), lambda x: x.bfloat16().float(), lambda x: x, 3],
    "01.3": [
        lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v,  # no scale
        lambda q, k, v: (q @ k.transpose(-1, -2) / q.shape[-1]).softmax(dim=-1) @ v,  # d, not its root
        lambda q, k, v: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-2) @ v,  # over the queries
        overflowing,
        torch.nn.functional.scaled_dot_product_attention,
    ],
}
