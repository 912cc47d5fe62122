"""A result file that grows row by row, so that a study can be stopped at any moment and go on where it was."""

from pathlib import Path

from sdopt import attention, results
from sdopt.bench import sensors

NOT_TIMED = "failed: not timed yet"  # of a row that was begun: it is taken up again


class Ledger:
    """The rows of one result file, written whole after every change.

    `head` is the result without its rows, `order` the ids of the rows it may hold. With `resume` the rows that are
    there already stay; UserError when they were measured otherwise (study, settings, machine or versions). With `retry`
    those that failed are not done.
    """

    def __init__(self, path, head, order, resume=False, retry=False):
        self.path, self.order, self.retry = Path(path), list(order), retry
        self.result = head | {"rows": []}
        if resume and self.path.exists():
            found = results.read(self.path)
            kept = {key: found[key] for key in ("gpu_state", "gpu_while_timed") if key in found}
            self.result = results.merge(found, self.result) | kept

    def row(self, i):
        """The row `i` as it stands, {} where there is none."""
        return next((row for row in self.result["rows"] if row["id"] == i), {})

    def is_done(self, i):
        """Whether row `i` needs no more work: it was measured, or it failed for a reason of its own."""
        status = self.row(i).get("status", NOT_TIMED)
        return status == "ok" or (status != NOT_TIMED and not self.retry)

    def begun(self, recipe):
        """The row of a recipe to be measured, with what an earlier attempt that was stopped knew of it."""
        row = {"id": recipe.id, "label": recipe.label, "settings": {}, "quality": None}
        old = self.row(recipe.id)
        return row | (old if old.get("status") == NOT_TIMED else {}) | {"status": NOT_TIMED}

    def put(self, *rows, **more):
        """Write `rows`, each in the place of the row of its id, and `more` beside the rows."""
        by_id = {row["id"]: row for row in (*self.result["rows"], *rows)}
        placed = sorted(by_id.values(), key=lambda row: self.order.index(row["id"]))
        self.result |= more | {"rows": placed}
        results.write(self.path, self.result)


def head(study, shared, device, prompts):
    """A result without rows: what was asked for, and the machine as it was found."""
    cuda = str(device).startswith("cuda")
    environment = results.environment(device)
    environment["xformers_state"] = attention.xformers_state() if environment["xformers"] else None
    return {
        "schema": results.SCHEMA,
        "study": study,
        "environment": environment,
        "gpu_state": sensors.state() if cuda else None,
        "settings": {**shared, "device": device, "prompts": [text for texts in prompts for text in texts]},
    }
