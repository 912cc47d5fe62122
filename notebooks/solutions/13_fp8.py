"""Answers to the exercises of 13_fp8, and mistakes that are often made."""

import torch


def quantise(x, largest=448.0):
    scale = x.abs().amax(1, keepdim=True).clamp(min=2.0**-100) / largest
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def one_scale(x):
    q, scale = quantise(x.reshape(1, -1))
    return q.reshape(x.shape), scale.expand(len(x), 1)


def without_zeros(x):
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale  # 0 / 0


def without_a_scale(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn), torch.ones(len(x), 1)


def of_e5m2(x):
    q, scale = quantise(x)
    return q.float().to(torch.float8_e5m2), scale


def fewer_bits(x):
    q, scale = quantise(x)
    return q.float().to(torch.float8_e5m2).float().to(torch.float8_e4m3fn), scale  # by way of e5m2, which has two


# 13.2: 100 goes to 448, so a number goes to 2**-6 when it is 100 / 448 / 64.
# 13.3: 8192 * 1280 numbers are 10 Mi. Apart: two bytes written, two read, one written; together one is written. 4 bytes each.
ANSWERS = {"13.1": quantise, "13.2": 100 / 448 / 64, "13.3": 40}

MISTAKES = {
    "13.1": [
        *(one_scale, without_zeros, without_a_scale, of_e5m2, fewer_bits),
        lambda x: quantise(x, 127.0),  # int8's largest: the smallest numbers fall off
        lambda x: quantise(x, 57344.0),  # e5m2's: the largest saturate
        torch.zeros(2),
    ],
    "13.2": [2**-6, 100 / 64, 100 / 448 / 512, "0.0035"],  # unscaled; as if 100 went to 1; the smallest number at all; a text
    "13.3": [10, 20, 30, 50],  # what stays; what is written less and what is read, one by one; all there was
}
