"""A compiler's search by several processes at once: each kernel is one process's, and is timed while no other times any.

By coordinate descent Inductor compiles and times candidate after candidate of kernel after kernel, in one thread: a quarter of
an hour and more, in which the GPU has next to nothing to do. So a row that searches is compiled in two passes. In the first,
LATER, one process compiles everything and leaves that search out. In the second, SHARED, several find it compiled, and each
searches the kernels that nobody has claimed yet. A claim is an empty file; another, in the end, holds the seconds that its
kernel took, without the waiting for the GPU. All seconds together are what one process would have taken.
"""

import fcntl
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from sdopt import results

ALONE, LATER, SHARED = "alone", "later", "shared"
SECONDS = ".seconds"
MOST = 8  # processes; each keeps a pipeline on the GPU, and about one core busy


@contextmanager
def applied(how: str, cache: Path | None):
    """Within, Inductor's searches are left out (LATER), shared (SHARED, over the folder `cache`) or as they are (ALONE).

    Gives the set of kernels that were left out, to be read afterwards.
    """
    left, waited = set(), []
    if how == ALONE:
        yield left
        return
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # which imports Triton

    search, bench = CachingAutotuner._coordinate_descent_tuning, CachingAutotuner.bench

    def leave(tuner, launcher, *args, **kwargs):
        if _name(tuner) not in left and tuner.save_cache_hook:
            # PyTorch 2.13 notes the best of the few that it always tries as if it had been searched for: it was not
            tuner.save_cache_hook(launcher.config, tuner.autotune_time_taken_ns, found_by_coordesc=False)
        left.add(_name(tuner))
        return launcher

    def claim(tuner, launcher, *args, **kwargs):
        mark = _folder(cache) / _name(tuner)
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return launcher
        waited.clear()
        began = time.monotonic()
        found = search(tuner, launcher, *args, **kwargs)
        seconds = time.monotonic() - began - sum(waited)
        results.write_whole(mark.with_suffix(SECONDS), str(seconds).encode())
        return found

    def in_turn(tuner, *args, **kwargs):
        asked = time.monotonic()
        with open(_folder(cache) / "gpu.lock", "a") as gpu:
            fcntl.flock(gpu, fcntl.LOCK_EX)
            waited.append(time.monotonic() - asked)
            return bench(tuner, *args, **kwargs)

    try:
        CachingAutotuner._coordinate_descent_tuning = claim if how == SHARED else leave
        CachingAutotuner.bench = in_turn if how == SHARED else bench
        yield left
    finally:
        CachingAutotuner._coordinate_descent_tuning, CachingAutotuner.bench = search, bench


def begin(cache: Path) -> None:
    """Forget all claims."""
    shutil.rmtree(_folder(cache), ignore_errors=True)
    _folder(cache).mkdir(parents=True)


def seconds(cache: Path) -> list[float]:
    """Of every kernel that has been searched since `begin`."""
    return [float(took.read_text()) for took in _folder(cache).glob(f"*{SECONDS}")]


def processes() -> int:
    """How many processes like this one, which has drawn with its pipeline on a GPU, could search there at once.

    Its own memory will be free then: that is for what the others need beside their tensors.
    """
    free, _ = torch.cuda.mem_get_info()
    room = free // max(torch.cuda.max_memory_reserved(), 1)
    return max(1, min(MOST, room, (os.cpu_count() or 2) // 2))


def _folder(cache):
    return cache / "claims"


def _name(tuner):
    return Path(tuner.filename).stem
