"""Answers to the exercises of 00_measure_first, and mistakes that are often made."""

import statistics


def median_and_spread(times):
    ordered = sorted(times)

    def at(share):
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return at(0.5), at(0.2), at(0.8)


def unsorted(times):
    return times[len(times) // 2], times[len(times) // 5], times[4 * len(times) // 5]


def upper_middle(times):
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[len(ordered) // 5], ordered[4 * len(ordered) // 5]


def in_place(times):
    times.sort()
    return median_and_spread(times)


def with_mean(times):
    return statistics.mean(times), *median_and_spread(times)[1:]


# 00.2: the whole divided by what is left of it. 00.3: 2 * n ** 3 operations at 19.5e12 a second, in ms; a clock that
# reads 0.03 ms did not wait.
ANSWERS = {"00.1": median_and_spread, "00.2": 2600 / (2600 - 185), "00.3": 2 * 4096**3 / 19.5e12 * 1e3}

MISTAKES = {
    "00.1": [unsorted, upper_middle, in_place, with_mean, lambda times: sorted(times)[len(times) // 2], 3],
    "00.2": [2505 / (2505 - 185), 2600 / 185, 185 / 2600, 2, "1.08"],  # without the rest; the share; twice as fast
    "00.3": [4096**3 / 19.5e12 * 1e3, 2 * 4096**3 / 19.5e12, 0.03],  # additions forgotten; in seconds
}
