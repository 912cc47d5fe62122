"""A result file that grows row by row, so that a study can be stopped at any moment and go on where it was."""

import fcntl
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from sdopt import attention, results
from sdopt.bench import sensors
from sdopt.errors import UserError

NOT_TIMED = "failed: not timed yet"  # of a row that was begun: it is taken up again


class Ledger:
    """The rows of one result file, written whole after every change.

    `head` is the result without its rows, `order` the ids of the rows it may hold. With `resume` the rows that are
    there already stay; UserError when they were measured otherwise (study, settings, machine or versions). With `retry`
    those that failed are not done. Without `resume` none stay, or, where `again` says what is to be measured again, those that
    are not among it and were measured alike.
    """

    def __init__(self, path, head, order, resume=False, retry=False, again=None):
        self.path, self.order, self.retry = Path(path), list(order), retry
        self.result = head | {"rows": []}
        self._putting = threading.Lock()
        found = results.read(self.path) if self.path.exists() else None
        if found and found.get("measured_by") != head.get("measured_by"):
            raise UserError(f"{self.path} holds rows of another command: give another folder with --out")
        if found and resume:
            kept = {key: found[key] for key in ("gpu_state", "gpu_while_timed") if key in found}
            self.result = results.merge(found, self.result) | kept
            commits = [result["environment"]["commit"] for result in (found, self.result)]
            if commits[0] != commits[1]:  # rows of the one and of the other
                self.result["environment"]["commit"] = f"{commits[0]}, then {commits[1]}"
            unknown = [row["id"] for row in self.result["rows"] if row["id"] not in self.order]
            if unknown:
                raise UserError(f"{self.path} has a row {unknown[0]}, which is none of this study: give another folder")
        elif found and again is not None:
            with suppress(UserError):
                rows = results.merge(found, self.result)["rows"]
                self.result["rows"] = [row for row in rows if row["id"] in self.order and row["id"] not in again]

    def row(self, i):
        """The row `i` as it stands, {} where there is none."""
        return next((row for row in self.result["rows"] if row["id"] == i), {})

    def is_done(self, i):
        """Whether row `i` needs no more work: it was measured, or it failed for a reason of its own."""
        status = self.row(i).get("status", NOT_TIMED)
        return status == "ok" or (status != NOT_TIMED and not self.retry)

    def begun(self, recipe):
        """The row of a recipe to be measured, with what an earlier attempt that was stopped knew of it."""
        row = {"id": recipe.id, "label": recipe.label, "settings": dict(recipe.settings), "quality": None, "status": NOT_TIMED}
        old = self.row(recipe.id)
        if old.get("status") == NOT_TIMED:
            return row | old
        return row | {key: old[key] for key in ("first_calls",) if key in old}  # a failed row compiled all the same

    def put(self, *rows, **more):
        """Write `rows`, each in the place of the row of its id, and `more` beside the rows."""
        with self._putting:
            by_id = {row["id"]: dict(row) for row in (*self.result["rows"], *rows)}  # which their owners go on changing
            placed = sorted(by_id.values(), key=lambda row: self.order.index(row["id"]))
            self.result |= more | {"rows": placed}
            results.write(self.path, self.result)


@contextmanager
def alone(folder):
    """Within, no other process measures into `folder`. Raises UserError when one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder itself is locked, so that no file is left behind
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"another process measures into {folder}: wait for it, or give another folder") from error
    try:
        yield
    finally:
        os.close(lock)


def head(study, shared, device, prompts, measured_by):
    """A result without rows: what was asked for, by which command, and the machine as it was found."""
    cuda = str(device).startswith("cuda")
    environment = results.environment(device)
    environment["xformers_state"] = attention.xformers_state() if environment["xformers"] else None
    return {
        "schema": results.SCHEMA,
        "study": study,
        "measured_by": measured_by,
        "environment": environment,
        "gpu_state": sensors.state() if cuda else None,
        "settings": {**shared, "device": device, "prompts": [text for texts in prompts for text in texts]},
    }
