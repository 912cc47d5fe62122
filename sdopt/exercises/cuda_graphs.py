"""Exercises of notebooks/12_cuda_graphs."""

import random
from collections import OrderedDict

from sdopt.exercises import number

LETTERS = "abcdef"
STALE = "cde"
WHY = {
    "a": "a replay reads its inputs anew, from the places they are copied to",
    "b": "a replay reads the weights anew, from the places where they are",
    "c": "a Python number is a constant of the recording",
    "d": "the graph knows the old address, and the weights now lie at another",
    "e": "an `if` is Python's: the graph holds the branch that was taken",
    "f": "a replay reads the embeddings anew, from the place they are copied to",
}


def _captures(answer):
    if not callable(answer):
        return f"give a function of the sizes and the limit, not a {type(answer).__name__}"
    rng = random.Random(0)
    logs = [([32, 48, 32, 64, 48], 2), ([1, 1, 2, 1], 1)]
    logs += [([rng.choice((16, 24, 32, 48, 64)) for _ in range(12)], limit) for limit in (2, 3, 3, 4)]
    for sizes, limit in logs:
        right, found = _least_recently_used(sizes, limit), answer(list(sizes), limit)
        if not isinstance(found, list) or found != right:
            return f"for sizes {sizes} and room for {limit} the captures are {right}, yours are {found!r}"[:300]
    return None


def _least_recently_used(sizes, limit):
    held, captured = OrderedDict(), []
    for size in sizes:
        if size not in held:
            captured.append(size)
            if len(held) == limit:
                held.popitem(last=False)
        held[size] = True
        held.move_to_end(size)
    return captured


def _stale(answer):
    given = answer.replace(" ", "").replace(",", "") if isinstance(answer, str) else answer
    if not isinstance(given, str | set | list | tuple) or not all(x in tuple(LETTERS) for x in given):
        return 'give the letters as text, such as "ab"'
    for letter in LETTERS:
        if (letter in given) != (letter in STALE):
            return f"think again about {letter}: {WHY[letter]}"
    return None


def _most(answer):
    return number(
        answer, 1.81, 1.83,
        "the waiting goes, all of it and nothing else: what is left of the second?",
        "times",
    )  # fmt: skip


EXERCISES = {"12.1": _captures, "12.2": _stale, "12.3": _most}
