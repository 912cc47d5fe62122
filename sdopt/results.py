"""The result file: what was measured, where, with which settings. Written whole or not at all, checked when read."""

import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import threading
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

from sdopt.errors import UserError

SCHEMA = 1
PACKAGES = ("diffusers", "transformers", "torchao", "xformers")
ENVIRONMENT = ("gpu", "driver", "torch", "cuda", "cudnn", "triton", *PACKAGES, "python", "cpu", "commit")
SETTINGS = (
    *("model", "weights", "height", "width", "steps", "guidance_scale"),
    *("batch", "scheduler", "seed", "prompt", "runs"),
)
SEARCHES = "-searches.json.xz"  # how the files that bench/searches.py writes end
STAGES = ("text_encoder", "unet", "unet_calls", "scheduler", "vae")


def environment(device="cpu"):
    """What the numbers depend on beside the settings, as the result file stores it: a dict of strings and None.

    "gpu" and "driver" are None unless `device` is a CUDA device: a run on the CPU of a GPU machine is a CPU run.
    Introduced in notebooks/00_measure_first.
    """
    cuda = str(device).startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if cuda else None,
        "triton": _version("triton"),
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "cpu": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "commit": _commit(),
    }


def machine_name(environment):
    """The folder name of a machine under figures/data: "nvidia-h200", "cpu-2-cores"."""
    cores = re.search(r"(\d+) cores$", environment["cpu"])
    name = environment["gpu"] or f"cpu {cores[1] if cores else '?'} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _commit():
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit} with changes" if changed else commit


def _cpu_name():
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def png(picture, dpi=None, text=None):
    """A PIL picture as the bytes of a PNG, as small as it gets without loss; `text`: what the file says beside it, {key: words}."""
    file, info = io.BytesIO(), PngInfo()
    for key, words in (text or {}).items():
        info.add_text(key, words)
    picture.save(file, "PNG", optimize=True, pnginfo=info, **({"dpi": (dpi, dpi)} if dpi else {}))
    return file.getvalue()


def write_whole(path, data):
    """Write the bytes `data` to `path`, all of them or none: a reader never sees half a file, nor loses the old one.

    Raises UserError when the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is what cannot be used
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room there or give another folder"
        ) from error


def write(path, result):
    """Validate `result` and write it to `path` whole. Raises UserError as `validate` and `write_whole` do."""
    validate(result, path)
    write_json(path, result)


def write_json(path, content):
    """Write any JSON file whole. Raises UserError as `write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read(path):
    """Read and validate a result file. Raises UserError, in one line, for one that is missing, not JSON, or not ours."""
    result = read_json(path)
    validate(result, path)
    return result


def read_json(path):
    """Read any JSON file. Raises UserError, in one line, for one that is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): measure it with `sdopt run`") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it or measure it again") from error


def validate(result, source="the result"):
    """Raise UserError, naming `source` and the first thing wrong, unless `result` has the schema of a result file."""
    wrong = _first_fault(result)
    if wrong:
        raise UserError(f"{source} is no result file of schema {SCHEMA} ({wrong}): restore it or measure it again")


def _first_fault(result):
    if not isinstance(result, dict):
        return "not an object"
    if result.get("schema") != SCHEMA:
        return f"schema is {result.get('schema')!r}"
    if not isinstance(result.get("study"), str):
        return "study is no text"
    for part, keys in (("environment", ENVIRONMENT), ("settings", SETTINGS)):
        if not isinstance(result.get(part), dict):
            return f"{part} is no object"
        missing = [key for key in keys if key not in result[part]]
        if missing:
            return f"{part} lacks {missing[0]}"
    if not isinstance(result.get("rows"), list):
        return "rows is no list"
    ids = [row.get("id") if isinstance(row, dict) else None for row in result["rows"]]
    if len(set(ids)) != len(ids):
        return "two rows have one id"
    for row in result["rows"]:
        fault = _row_fault(row)
        if fault:
            return f"row {row.get('id') if isinstance(row, dict) else row}: {fault}"
    return None


def _row_fault(row):
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return "no id"
    status = row.get("status")
    if not isinstance(status, str) or not (status == "ok" or status.startswith("failed: ")):
        return f"status is {status!r}"
    if not isinstance(row.get("settings"), dict):
        return "settings is no object"
    if status != "ok":
        return None
    latency = row.get("latency_s")
    if not isinstance(latency, dict) or not all(_positive(latency.get(key)) for key in ("median", "p20", "p80")):
        return "latency_s lacks a positive median, p20 or p80"
    if not isinstance(latency.get("runs"), list) or not latency["runs"] or not all(map(_positive, latency["runs"])):
        return "latency_s lacks its runs"
    for key in ("first_call_s", "peak_memory_bytes"):
        if not _positive(row.get(key)):
            return f"{key} is {row.get(key)!r}"
    stages = row.get("stages_ms")
    if not isinstance(stages, dict) or any(key not in stages for key in STAGES):
        return "stages_ms lacks a stage"
    if "quality" not in row or not isinstance(row["quality"], dict | None):
        return "quality is neither an object nor null"
    return None


def _positive(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def merge(old, new):
    """`old` with the rows of `new` put in, by id: new ones replace, the others stay.

    Raises UserError when the two were not measured alike (study, settings, or machine and versions).
    """
    for part in ("study", "settings", "environment"):
        if part == "study":
            differ = ["study"] if old["study"] != new["study"] else []
        else:
            keys = (old[part].keys() | new[part].keys()) - {"commit"}
            differ = sorted(key for key in keys if old[part].get(key) != new[part].get(key))
        if differ:
            raise UserError(
                f"the rows already there were measured with another {', '.join(differ)}: give another folder"
            )
    rows = {row["id"]: row for row in old["rows"]} | {row["id"]: row for row in new["rows"]}
    return {**new, "rows": list(rows.values())}


def compare(row, other, about=()):
    """How much faster `row` is than `other`, both of one result file: {"speedup", "clear"}.

    `speedup` is the ratio of the medians; `clear` says whether the intervals from p20 to p80 stay apart. `about` names
    the settings the two rows are there to compare. Raises UserError when they differ in any other setting, or one has no times.
    """
    for each in (row, other):
        if "latency_s" not in each:
            raise UserError(f"row {each['id']} has no times ({each.get('status')}): measure it first")
    mine, theirs = row["settings"], other["settings"]
    differ = sorted(k for k in (mine.keys() | theirs.keys()) - set(about) if mine.get(k) != theirs.get(k))
    if differ:
        raise UserError(f"rows {row['id']} and {other['id']} differ in {', '.join(differ)}: measure them alike first")
    a, b = row["latency_s"], other["latency_s"]
    return {"speedup": b["median"] / a["median"], "clear": a["p80"] < b["p20"] or b["p80"] < a["p20"]}
