"""Answers to the exercises of 14_is_it_still_the_same_picture, and mistakes that are often made."""

import numpy as np
import torch


def psnr(images, reference, peak=255):
    squared = (images.float() - reference.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(peak**2 / squared)


def of_bytes(images, reference):
    return 10 * torch.log10(255**2 / (images - reference).float().square().mean((1, 2, 3)))  # 3 - 5 is 254


def of_all(images, reference):
    return 10 * torch.log10(255**2 / (images.float() - reference.float()).square().mean())


def interval(right, other, of, quantiles=(0.025, 0.975)):
    gained, of = np.subtract(right, other), np.array(of)
    drawn = np.random.default_rng(0).integers(0, len(of), (5000, len(of)))
    return np.quantile(gained[drawn].sum(1) / of[drawn].sum(1), quantiles)


def unpaired(right, other, of):
    right, other, of = map(np.array, (right, other, of))
    one, two = np.random.default_rng(0).integers(0, len(of), (2, 5000, len(of)))
    shares = right[one].sum(1) / of[one].sum(1) - other[two].sum(1) / of[two].sum(1)
    return np.quantile(shares, (0.025, 0.975))


def mean_of_shares(right, other, of):
    """As if a prompt with one object weighed as much as one with eight."""
    gained = np.subtract(right, other) / np.array(of)
    drawn = np.random.default_rng(0).integers(0, len(gained), (5000, len(gained)))
    return np.quantile(gained[drawn].mean(1), (0.025, 0.975))


def of_objects(right, other, of):
    """Every object by itself, as if those of one picture did not stand or fall together."""
    gained = np.concatenate([[(a - b) / n] * n for a, b, n in zip(right, other, of)])
    drawn = np.random.default_rng(0).integers(0, len(gained), (5000, len(gained)))
    return np.quantile(gained[drawn].mean(1), (0.025, 0.975))


# 14.3: the distance d and the bias b of 50: d + b = 3.0; of 25 it is twice that: d + 2 b = 4.4. So b = 1.4.
ANSWERS = {"14.1": psnr, "14.2": interval, "14.3": 1.6}

MISTAKES = {
    "14.1": [
        *(of_bytes, of_all),
        lambda images, reference: psnr(images, reference, peak=1),  # for pictures from 0 to 1
        lambda images, reference: psnr(images, reference).clamp(max=100),  # not infinite
        lambda images, reference: psnr(images, reference) / 2,
        30.0,
    ],
    "14.2": [
        *(unpaired, of_objects, mean_of_shares),
        lambda right, other, of: interval(other, right, of),  # the other way round
        lambda right, other, of: interval(right, other, of, (0.16, 0.84)),  # one standard deviation
        lambda right, other, of: interval(right, other, of, (0.05, 0.95)),  # a 90 % interval
        lambda right, other, of: interval(right, other, of)[0],
        (-0.1, 0.1),
    ],
    "14.3": [3.0, 1.4, 4.4, 5.8, "1.6"],  # as it is; the bias; halves; the bias added; a text
}
