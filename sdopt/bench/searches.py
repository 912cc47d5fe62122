"""What a compiler's search found, in one small file, and how long it took: a search that was stopped goes on.

In max-autotune Inductor times every kernel it knows for each product and convolution, and by coordinate descent it tries
neighbouring tile sizes of each kernel that it writes, one after the other: twenty minutes and more for a UNet. What comes of
it is a few numbers a kernel, which lie in Inductor's cache among gigabytes of compiled candidates. They are gathered into
OUT/cache/<model>-searches.json.xz while a row compiles, and put back before it does, on another machine of the same kind and
versions, too. The seconds that were spent before are counted in: a first call stays as cold as it was.
The file holds numbers, and no code.
"""

import json
import lzma
import re
import threading

from sdopt import results
from sdopt.errors import UserError

NOTHING = {"spent_s": 0.0, "finished": False}
ONE_AT_A_TIME = threading.Lock()  # rows of one study may compile side by side, and their finds are in one file
# In Inductor's cache: times of kernels by product and convolution, and tile sizes by kernel.
CHOICES, TILES = re.compile(r"cache/\w+"), re.compile(r"\w+/\w+\.best_config")


def begin(job) -> dict:
    """{"spent_s", "finished"} of the row's compilation so far; what its searches found out about products and convolutions
    is put where Inductor looks for it.

    Raises UserError for a damaged file.
    """
    kept = _read(job)
    _put(job, kept, CHOICES, lambda target: not target.exists())
    return kept["rows"].get(job.recipe.id, NOTHING)


def go_on(job) -> None:
    """Put the tile sizes that its searches found where Inductor looks for them, once the row has been compiled.

    Not before: a graph would be kept with the found tiles alone, and PyTorch 2.11 does not know in the next process that they
    were found. Each warm start would search again, which it does not where the search came after the graph.
    """
    _put(job, _read(job), TILES, lambda target: not is_found(target))


def is_found(path) -> bool:
    """Whether a search has found the tile sizes in this file of Inductor's cache."""
    return _by_search(_content(path))


def _put(job, kept, kind, missing):
    for name, find in kept["finds"].items():
        if kind.fullmatch(name) and missing(target := job.inductor / name):
            results.write_whole(target, json.dumps(find).encode())


def keep(job, spent_s: float, finished: bool = False) -> None:
    """Gather what was found so far, and note how long the row has been compiling.

    Of a row that has finished and found nothing there is nothing to say: it can be compiled anew at any time.
    """
    with ONE_AT_A_TIME:
        kept = _read(job)
        kept["finds"] = _merged(kept["finds"], _finds(job.inductor))
        kept["rows"][job.recipe.id] = {"spent_s": spent_s, "finished": finished}
        if finished and not job.recipe.searches:
            del kept["rows"][job.recipe.id]
        results.write_whole(_path(job), lzma.compress(json.dumps(kept, indent=1, sort_keys=True).encode()))


def _path(job):
    return job.cache / f"{job.model}{results.SEARCHES}"


def _read(job):
    path = _path(job)
    if not path.exists():
        return {"rows": {}, "finds": {}}
    try:
        return json.loads(lzma.decompress(path.read_bytes()))
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: delete it, and what it held is searched for anew") from error


def _merged(old, new):
    """`new` over `old`, dict by dict: times that either row took of products stand in one find."""
    both = isinstance(old, dict) and isinstance(new, dict)
    return {key: _merged(old.get(key, {}), new.get(key, old.get(key))) for key in old | new} if both else new


def _finds(inductor):
    """The searches' results in Inductor's cache, {name: content}: not what it chose from the few it always tries."""
    choices = {path: _content(path) for path in inductor.glob("cache/*")}
    tiles = {path: _content(path) for path in inductor.glob("*/*.best_config")}
    found = {path: content for path, content in choices.items() if content is not None}
    found |= {path: content for path, content in tiles.items() if _by_search(content)}
    return {path.relative_to(inductor).as_posix(): content for path, content in found.items()}


def _by_search(content):
    return isinstance(content, dict) and bool(content.get("found_by_coordesc"))


def _content(path):
    """What a file of Inductor's cache holds, None where it is no result, or being written in this moment."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
