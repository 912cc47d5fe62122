"""What was seen in every single picture of a row: written compressed beside the result file, and what follows from it."""

import json
import lzma
from pathlib import Path

from sdopt import intervals, results
from sdopt.errors import UserError

SUFFIX = ".json.xz"
FACTS = ("objects", "relations")
DRIFT = {"psnr_db": 2, "ssim": 5, "p99": 0, "latent_cosine": 6}  # each with the decimals it is kept with


def of(agreements, drift=None):
    """The record of a row's pictures: a list of one number a picture for everything that was seen in them.

    `agreements`: what the oracle read, one `scenes.Agreement` a prompt; `drift`: what `quality.paired` returned, None where
    pictures start from other noise. {"objects_right", "objects_of", "relations_right", "relations_of"} and, of a drift,
    DRIFT's. Only what this rounds to is counted from here on, so that anyone can count again.
    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    record = {}
    for fact in FACTS:
        record[f"{fact}_right"] = [sum(getattr(agreement, fact)) for agreement in agreements]
        record[f"{fact}_of"] = [len(getattr(agreement, fact)) for agreement in agreements]
    for name, decimals in DRIFT.items() if drift else ():
        record[name] = [round(value, decimals) if decimals else int(value) for value in drift[name]]
    return record


def quality(record, reference=None, frechet=None):
    """The quality of a row from its record, and of what it differs in from the `reference` row's record.

    {"objects", "relations", "prompts_all_right", "psnr_db", "ssim", "p99", "latent_cosine", "frechet", "change"}, each
    {"value", "low", "high", "n"} with a 95 % interval over prompts (see `intervals`); a drift that was not measured is
    None. `change`: how much larger the three shares are than the reference's, paired by prompt; None for the reference.
    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    counts = _counts(record)
    seen = {fact: intervals.ratio(*counted) for fact, counted in counts.items()}
    seen |= {name: intervals.mean(record[name]) if name in record else None for name in DRIFT}
    change = None
    if reference:
        other = _counts(reference)
        change = {fact: intervals.difference(right, other[fact][0], of) for fact, (right, of) in counts.items()}
    return seen | {"frechet": frechet, "change": change}


def _counts(record):
    """{fact: (right, of)}, a number a prompt each."""
    counts = {fact: (record[f"{fact}_right"], record[f"{fact}_of"]) for fact in FACTS}
    right, of = ([sum(pair) for pair in zip(*(counts[fact][k] for fact in FACTS), strict=True)] for k in (0, 1))
    whole = [int(a == b) for a, b in zip(right, of, strict=True)]
    return counts | {"prompts_all_right": (whole, [1] * len(whole))}


def write(path, record):
    """Write a record whole. Raises UserError as `results.write_whole` does."""
    results.write_whole(path, lzma.compress(json.dumps(record, separators=(",", ":")).encode()))


def read(path):
    """Read a record. Raises UserError, in one line, for one that is missing or damaged."""
    try:
        return json.loads(lzma.decompress(Path(path).read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): measure its row again") from error
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: restore it, or delete it and measure its row again") from error
