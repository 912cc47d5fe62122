"""A compiler's search by several processes at once: each kernel is one process's, and is timed while no other times any.

By coordinate descent Inductor compiles and times candidate after candidate of kernel after kernel, in one thread: a quarter of
an hour and more, in which the GPU has next to nothing to do. So a row that searches is compiled in two passes. In the first,
LATER, one process compiles everything and leaves that search out. In the second, SHARED, several find it compiled, and each
searches the kernels that no search has been through and nobody has claimed yet. A claim is an empty file; another, in the
end, holds the seconds that its kernel took, without the waiting for the GPU. All seconds together are what one process
would have taken.
Rows of a peer study that search are compiled side by side: in whichever row Inductor times a kernel, it has the GPU's lock.
"""

import fcntl
import os
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdopt import results

ALONE, LATER, SHARED = "alone", "later", "shared"
SECONDS = ".seconds"
MOST = 8  # processes, of all rows together; each keeps a pipeline on the GPU, and about one core busy


@dataclass
class Search:
    """The finds that a process left out of a search, by path, and the seconds it waited for others that timed a kernel."""

    left: set[str] = field(default_factory=set)
    waited: list[float] = field(default_factory=list)


@contextmanager
def applied(how: str, folder: Path | None):
    """Within, Inductor's searches are left out (LATER), shared (SHARED, by claims in `folder`) or as they are (ALONE).

    Inductor times kernels while no other process does, unless it is ALONE. Gives a `Search`, to be read afterwards.
    """
    seen = Search()
    if how == ALONE:
        yield seen
        return
    from torch._inductor.runtime import benchmarking
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # which imports Triton

    benchmarker = type(benchmarking.benchmarker)
    search, bench = CachingAutotuner._coordinate_descent_tuning, benchmarker.benchmark_gpu
    in_turn = _in_turn(bench, folder.parent / "gpu.lock", seen.waited)

    def leave(tuner, launcher, *args, **kwargs):
        kept, find = _kept(tuner)
        if kept and find not in seen.left and not _is_known(tuner):
            # PyTorch 2.13 notes the best of the few that it always tries as if it had been searched for: it was not
            kept.save(launcher.config, tuner.autotune_time_taken_ns, found_by_coordesc=False)
            seen.left.add(find)
        return launcher

    def claim(tuner, launcher, *args, **kwargs):
        if _is_known(tuner):
            return launcher
        mark = folder / Path(tuner.filename).stem
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return launcher
        before, began = sum(seen.waited), time.monotonic()
        found = search(tuner, launcher, *args, **kwargs)
        seconds = time.monotonic() - began - (sum(seen.waited) - before)
        results.write_whole(mark.with_suffix(SECONDS), str(seconds).encode())
        return found

    try:
        CachingAutotuner._coordinate_descent_tuning = claim if how == SHARED else leave
        benchmarker.benchmark_gpu = in_turn
        yield seen
    finally:
        CachingAutotuner._coordinate_descent_tuning, benchmarker.benchmark_gpu = search, bench


def _in_turn(bench, lock, waited):
    """`bench`, called while no other process holds the file `lock`; the seconds until then are added to `waited`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    here, within = threading.RLock(), []

    def in_turn(*args, **kwargs):
        asked = time.monotonic()
        with here, open(lock, "a") as gpu:
            if not within:  # what is timed may time parts of it
                fcntl.flock(gpu, fcntl.LOCK_EX)
            waited.append(time.monotonic() - asked)
            within.append(bench)
            try:
                return bench(*args, **kwargs)
            finally:
                within.pop()

    return in_turn


def begin(folder: Path) -> None:
    """Forget all claims in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def seconds(folder: Path) -> list[float]:
    """Of every kernel that has been searched since `begin`."""
    return [float(took.read_text()) for took in folder.glob(f"*{SECONDS}")]


def processes() -> int:
    """How many processes like this one, which has drawn with its pipeline on a GPU, could search there at once, for all rows.

    Its own memory will be free then: that is for what they need beside their tensors.
    """
    free, _ = torch.cuda.mem_get_info()
    room = free // max(torch.cuda.max_memory_reserved(), 1)
    return max(1, min(MOST, room, (os.cpu_count() or 2) // 2))


def _kept(tuner):
    """Inductor's cache of one kernel's find, and the find's path; (None, None) where it keeps none on disk."""
    kept = getattr(tuner.save_cache_hook, "__self__", None)
    return (kept, kept.local_cache[1]) if kept and kept.local_cache else (None, None)


def _is_known(tuner):
    """Whether the kernel has been searched before.

    PyTorch 2.11 does not say so of each that was (https://github.com/pytorch/pytorch/issues/172819), and Triton forgets the mark
    of a config that went through a pickle (https://github.com/pytorch/pytorch/pull/181292). What was noted in this process,
    after the few that are always tried, is no find either.
    """
    kept, _ = _kept(tuner)
    if kept is None or tuner.autotune_time_taken_ns:
        return False
    find = kept._read() or {}
    return bool(find.get("found_by_coordesc")) and find.get("configs_hash") == kept.configs_hash
