"""Exercises of notebooks/00_measure_first."""

import random

from sdopt.exercises import number


def _median_and_spread(answer):
    if not callable(answer):
        return f"give the function itself, not {answer!r}"
    rng = random.Random(0)
    for times in ([3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0], [rng.random() for _ in range(11)] + [100.0]):
        given = list(times)
        returned = answer(given)
        if not isinstance(returned, tuple | list) or len(returned) != 3:
            return f"return three numbers, (median, p20, p80), not {returned!r}"
        if given != times:
            return "the list that came in was changed: sorted(times) makes a new one"
        for name, share, value in zip(("median", "p20", "p80"), (0.5, 0.2, 0.8), returned):
            right = _percentile(times, share)
            if not abs(value - right) < 1e-9:
                shown = ", ".join(f"{t:.3g}" for t in times)
                return f"the {name} of [{shown}] is {right:.4g}, yours is {value:.4g}"
    return None


def _percentile(times, share):
    ordered, position = sorted(times), share * (len(times) - 1)
    below = int(position)
    above = min(below + 1, len(times) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _free_vae(answer):
    return number(
        answer, 1.0761, 1.0771,
        "what is left when the VAE takes nothing? Divide the whole, with its unnamed rest, by that",
    )  # fmt: skip


def _least_time(answer):
    return number(
        answer, 7.0, 7.1,
        "each of the 4096 * 4096 results is a sum of 4096 products: a multiplication and an addition each",
        "milliseconds",
    )  # fmt: skip


EXERCISES = {"00.1": _median_and_spread, "00.2": _free_vae, "00.3": _least_time}
