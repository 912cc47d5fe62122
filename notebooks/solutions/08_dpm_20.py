"""Answers to the exercises of 08_dpm_20, and mistakes that are often made."""

import math


def to_v(epsilon, x, sigma):
    """D = x - sigma * epsilon and D = x / (sigma**2 + 1) - sigma / sqrt(sigma**2 + 1) * v, solved for v."""
    root = math.sqrt(sigma**2 + 1)
    return root * epsilon - sigma / root * x


def heun(denoised, x, sigmas):
    for now, then in zip(sigmas, sigmas[1:]):
        slope = (x - denoised(x, now)) / now
        there = x + slope * (then - now)
        slope_there = (there - denoised(there, then)) / then
        x = x + (slope + slope_there) / 2 * (then - now)
    return x


def euler(denoised, x, sigmas):
    for now, then in zip(sigmas, sigmas[1:]):
        x = x + (x - denoised(x, now)) / now * (then - now)
    return x


def twice(denoised, x, sigmas):
    """Goes on from where Euler's step arrived instead of from the start."""
    for now, then in zip(sigmas, sigmas[1:]):
        slope = (x - denoised(x, now)) / now
        x = x + slope * (then - now)
        x = x + (x - denoised(x, then)) / then * (then - now)
    return x


def dpm_2m(denoised, x, sigmas):
    """Second order too, but by memory: one call a step."""
    last = None
    for now, then in zip(sigmas, sigmas[1:]):
        d, h = denoised(x, now), math.log(now / then)
        ahead = d if last is None else d + (d - last) / 2
        x, last = then / now * x + (1 - math.exp(-h)) * ahead, d
    return x


def midpoint(denoised, x, sigmas):
    """Second order as well, and two calls a step, but one of them half-way."""
    for now, then in zip(sigmas, sigmas[1:]):
        middle = math.sqrt(now * then)
        half = x + (x - denoised(x, now)) / now * (middle - now)
        x = x + (half - denoised(half, middle)) / middle * (then - now)
    return x


def asks_for_nothing(denoised, x, sigmas):
    return dpm_2m(lambda x, sigma: (denoised(x, sigma), denoised(x, sigmas[sigmas.index(sigma) + 1]))[0], x, sigmas)


ANSWERS = {"08.1": to_v, "08.2": heun}

MISTAKES = {
    "08.1": [
        lambda epsilon, x, sigma: epsilon,
        lambda epsilon, x, sigma: epsilon - sigma * x,  # forgets that v is of unit size
        lambda epsilon, x, sigma: x - sigma * epsilon,  # D itself
    ],
    "08.2": [euler, twice, dpm_2m, midpoint, asks_for_nothing, lambda denoised, x, sigmas: x],
}
