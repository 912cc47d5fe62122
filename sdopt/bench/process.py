"""Run one function in a fresh process; whatever becomes of it, the caller gets an answer."""

import multiprocessing
import os
import signal
import sys
import time
import traceback

from sdopt.errors import UserError

# What every row imports anyway, loaded once into the fork server. Importing neither runs an op nor starts CUDA there.
PRELOAD = ["sdopt.bench.row"]
GRACE_S = 20.0  # for a process that has answered to put its things away


class RowFailed(Exception):
    """Why a row has no numbers, in one line."""


def context(device):
    """The way to start processes for rows on `device`.

    On a CPU they are forked from a server that has imported torch and diffusers and done nothing else: a clean process
    a row, without ten seconds of imports. A CUDA process is started from nothing: CUDA does not survive a fork.
    """
    if str(device).startswith("cuda"):
        return multiprocessing.get_context("spawn")
    # By default an OpenMP thread spins for milliseconds while it waits for the others; let anything else run on the
    # machine and a row takes many times as long. With a short spin it loses its share of the time and no more. On an
    # idle machine the short spin itself costs a few percent, of every row alike.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def call(ctx, function, job, on_phase, limit_s):
    """`function(job, tell)` in a fresh process of `ctx`; returns what it returns.

    `tell(phase)` in the child calls `on_phase(phase)` here. Raises RowFailed when the child raises, dies or takes longer
    than `limit_s` seconds, and UserError when it raises one.
    """
    here, there = ctx.Pipe(duplex=False)
    process = ctx.Process(target=_child, args=(there, function, job))
    process.start()
    there.close()
    deadline, answered = time.monotonic() + limit_s, False
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            kind, value = here.recv()
            answered = kind != "phase"
            if kind == "phase":
                on_phase(value)
            elif kind == "done":
                return value
            elif kind == "refused":
                raise UserError(value)
            else:
                raise RowFailed(value)
        raise RowFailed(f"stopped after {limit_s:.0f} s")
    except EOFError:
        process.join()
        raise RowFailed(_death(process.exitcode)) from None
    finally:
        here.close()
        process.join(GRACE_S if answered else 0)
        process.kill()
        process.join()


def _child(pipe, function, job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer, who ends this process
    try:
        answer = ("done", function(job, lambda phase: pipe.send(("phase", phase))))
    except UserError as error:
        answer = ("refused", str(error))
    except RowFailed as failure:
        answer = ("failed", str(failure))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        answer = ("failed", summary(error))
    pipe.send(answer)


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
