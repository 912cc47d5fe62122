"""What a GPU was doing while it was timed, as nvidia-smi tells it: clocks, power, temperature."""

import statistics
import subprocess
from contextlib import contextmanager

STATE = {  # as found, before anything is measured
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
WATCHED = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}
EVERY_MS = 100
LOOK = ("--format=csv,noheader,nounits", "--id=0")


def state():
    """The GPU as it is now: {"sm_clock_mhz", ...}, a number each (None where it does not tell); None without one."""
    try:
        done = subprocess.run(_command(STATE), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(STATE, _numbers(done.stdout.splitlines()[0]), strict=True))


@contextmanager
def watch(device, into):
    """Within, look at the GPU ten times a second; afterwards `into` has median, low and high of what was seen.

    {"sm_clock_mhz": {"median", "low", "high"}, "power_w": ..., "temperature_c": ...}; nothing on a CPU, or without
    nvidia-smi.
    """
    try:
        if not str(device).startswith("cuda"):
            raise FileNotFoundError
        process = subprocess.Popen(
            _command(WATCHED, f"--loop-ms={EVERY_MS}"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield
        return
    try:
        process.stdout.readline()  # it is looking from here on
        yield
    finally:
        process.terminate()
        lines = [
            _numbers(line) for line in process.communicate()[0].splitlines() if line.count(",") == len(WATCHED) - 1
        ]
        for name, seen in zip(WATCHED, zip(*lines)):
            seen = [value for value in seen if value is not None]
            if seen:
                into[name] = {"median": statistics.median(seen), "low": min(seen), "high": max(seen)}


def _command(fields, *more):
    return ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", *LOOK, *more]


def _numbers(line):
    return [_number(text) for text in line.split(",")]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", on a laptop's GPU say
