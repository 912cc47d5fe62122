"""Answers to the exercises of 12_cuda_graphs, and mistakes that are often made."""


def captures(sizes, limit):
    held, captured = [], []  # the least recently used first
    for size in sizes:
        if size in held:
            held.remove(size)
        else:
            captured.append(size)
            held = held[-(limit - 1) :] if limit > 1 else []
        held.append(size)
    return captured


def first_in_first_out(sizes, limit):
    held, captured = [], []
    for size in sizes:
        if size not in held:
            captured.append(size)
            held = [*held, size][-limit:]  # a size that is used again keeps its old place
    return captured


def without_a_limit(sizes, limit):
    return list(dict.fromkeys(sizes))


def most_recently_used_goes(sizes, limit):
    held, captured = [], []
    for size in sizes:
        if size not in held:
            captured.append(size)
            held = [*held[: limit - 1], size]
    return captured


# 12.2: c and e are Python's, d lies elsewhere; a, b and f are read from where they are.
# 12.3: 30 * (27 - 12) ms = 0.45 s of waiting go: 1 / (1 - 0.45).
ANSWERS = {"12.1": captures, "12.2": "cde", "12.3": 1 / 0.55}

MISTAKES = {
    "12.1": [first_in_first_out, without_a_limit, most_recently_used_goes, lambda sizes, limit: len(set(sizes)), [32]],
    "12.2": ["bcde", "cd", "de", "", "xyz", {"c", "d", "e", "f"}],
    "12.3": [27 / 12, 0.45, 1.45, "1.82"],  # the call's gain; the share; one plus the share; a text
}
