"""Calls in processes of their own; whatever becomes of them, the caller gets an answer."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import connection

from tqdm import tqdm

from sdopt.errors import UserError

# What every row imports anyway, loaded once into the fork server.
PRELOAD = ["sdopt.bench.row"]
# The phases after all that is timed: from there on another process disturbs nothing.
PROFILING, KEEPING = "a look at its kernels", "keeping what was compiled"
GRACE_S = 20.0  # for a process that has answered to put its things away
LOOK_S = 30.0  # between looks at what a call that takes long has left behind


class RowFailed(Exception):
    """Why a row has no numbers, in one line."""


def context(device):
    """The way to start processes for rows on `device`.

    For a CPU they are forked from a server that has imported torch and diffusers: a clean process a row, without ten
    seconds of imports. CUDA does not survive a fork, and imports start it (diffusers imports peft, that torchao, whose
    kernels ask the GPU what it can do; xformers does, too), so that processes for a GPU begin from nothing.
    """
    if str(device).startswith("cuda"):
        return multiprocessing.get_context("spawn")
    # By default an OpenMP thread spins for milliseconds while it waits for the others; let anything else run on the
    # machine and a row takes many times as long. With a short spin it loses its share of the time and no more. On
    # an idle machine the short spin itself costs a few percent, of every row alike.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


class Worker:
    """A process that makes one call after another, each with the dict `state` that it keeps between them."""

    def __init__(self, ctx):
        self._here, there = ctx.Pipe()
        self._process = ctx.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def call(
        self, function, *arguments, on_phase=lambda phase: None, meanwhile=lambda: None, limit_s=3600.0
    ):
        """`function(state, tell, *arguments)` in the process; returns what it returns.

        `tell(phase)` in the process calls `on_phase(phase)` here, and `meanwhile()` is called here every LOOK_S seconds
        without news. Raises RowFailed when it raises, dies or takes longer than `limit_s` seconds, and UserError when it
        raises one. A process that died or was stopped answers no more.
        """
        deadline = time.monotonic() + limit_s
        try:
            self._here.send((function, arguments))
            while (left := deadline - time.monotonic()) > 0:
                if not self._here.poll(min(left, LOOK_S)):
                    meanwhile()
                    continue
                kind, value = self._here.recv()
                if kind == "phase":
                    on_phase(value)
                elif kind == "done":
                    return value
                elif kind == "refused":
                    raise UserError(value)
                else:
                    raise RowFailed(value)
        except (EOFError, OSError):
            self._process.join(GRACE_S)
            raise RowFailed(_death(self._process.exitcode)) from None
        self.stop()
        raise RowFailed(f"stopped after {limit_s:.0f} s")

    def let_go(self):
        """Ask no more of the process, which ends by itself."""
        self._here.close()

    def close(self):
        """Let the process end by itself, which takes it a moment to put its things away."""
        self.let_go()
        self._process.join(GRACE_S)
        self.stop()

    def stop(self):
        """End the process at once."""
        self._process.kill()
        self._process.join()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.stop() if kind is not None and not issubclass(kind, (RowFailed, UserError)) else self.close()


def _serve(pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer, who ends this process
    threading.Thread(target=_end_with_caller, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is stopped would leave behind
    for name in PRELOAD:
        importlib.import_module(name)
    state = {}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(function, state, lambda phase: pipe.send(("phase", phase)), arguments))


def _end_with_caller():
    """Whatever ends the caller ends this process, in the middle of a call too: nobody is left to hear the answer."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _answer(function, state, tell, arguments):
    try:
        return "done", function(state, tell, *arguments)
    except UserError as error:
        return "refused", str(error)
    except RowFailed as failure:
        return "failed", str(failure)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return "failed", summary(error)


def summary(error, width=160):
    """An exception as one short line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."


def _death(exitcode):
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"its process ended with exit code {exitcode}"


class Fresh:
    """Fresh workers, for one thread or several; with `ahead`, the next imports while this one's call is at its last phases."""

    def __init__(self, ctx, ahead):
        self._ctx, self._ahead, self._waiting, self._taken, self._leaving = ctx, ahead, [], [], []
        self._taking, self.stopped = threading.Lock(), False

    def take(self):
        """A worker that has done nothing yet. Raises RowFailed when all are to end."""
        with self._taking:
            if self.stopped:
                raise RowFailed("stopped")
            worker = self._waiting.pop(0) if self._waiting else Worker(self._ctx)
            self._taken.append(worker)
        return worker

    def start_next(self, count=1):
        """With `ahead`, let workers start and import now until `count` of them wait, or as many as there are cores."""
        with self._taking:
            while self._ahead and len(self._waiting) < min(count, os.cpu_count() or 1):
                self._waiting.append(Worker(self._ctx))

    def let_go(self, worker):
        """Ask no more of a worker. It takes seconds to give a GPU's memory back: `join` waits for it."""
        worker.let_go()
        self._leaving.append(worker)

    def join(self):
        """Wait until the workers that were let go have ended."""
        while self._leaving:
            self._leaving.pop().close()

    def stop(self):
        """End all workers that were taken, in whichever thread they are called; `stopped` says that it was so."""
        with self._taking:
            self.stopped = True
        for worker in self._taken:
            worker.stop()

    def call(self, function, *arguments, on_phase=lambda phase: None, **how):
        """One call in a worker of its own, as `Worker.call`."""

        def told(phase):
            if phase in (PROFILING, KEEPING):
                self.start_next()
            on_phase(phase)

        with self.take() as worker:
            return worker.call(function, *arguments, on_phase=told, **how)

    def side_by_side(self, call, items, at_once):
        """[call(item) for each of `items`], `at_once` at a time; when one raises, or Ctrl-C is pressed, all workers are ended."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                calls = [pool.submit(call, item) for item in items]
                for done in as_completed(calls):
                    done.result()
                return [each.result() for each in calls]
            except BaseException:  # nobody waits for the others then
                self.stop()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.join()
        for worker in self._waiting:
            worker.stop()
