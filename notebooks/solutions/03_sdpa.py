"""Answers to the exercises of 03_sdpa, and mistakes that are often made."""

import torch


def merge(a, b):
    (best_a, total_a, out_a), (best_b, total_b, out_b) = a, b
    best = torch.maximum(best_a, best_b)
    shrink_a, shrink_b = (best_a - best).exp(), (best_b - best).exp()  # one of the two is 1
    return (out_a * shrink_a + out_b * shrink_b) / (total_a * shrink_a + total_b * shrink_b)


def without_rescaling(a, b):
    return (a[2] + b[2]) / (a[1] + b[1])


def mean_of_the_two(a, b):
    return (a[2] / a[1] + b[2] / b[1]) / 2


def without_a_maximum(a, b):  # right, until the exponential overflows
    return (a[2] * a[0].exp() + b[2] * b[0].exp()) / (a[1] * a[0].exp() + b[1] * b[0].exp())


# 3.1: 2 * 10 * 4096 * 4096 * 4 bytes / 2**20. In bf16 it is half of that, and softmax writes as much again.
ANSWERS = {"03.1": 1280, "03.2": merge}

MISTAKES = {
    "03.1": [640, 320, 1342.17728, "1280"],  # half precision; and of one sample; MB and not MiB; a text
    "03.2": [without_rescaling, mean_of_the_two, without_a_maximum, lambda a, b: a],
}
