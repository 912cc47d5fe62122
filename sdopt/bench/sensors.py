"""What a GPU was doing while it was timed: clocks, power, temperature."""

import statistics
import subprocess
import threading
from contextlib import contextmanager

import torch

STATE = {  # as found, before anything is measured
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
WATCHED = {
    "sm_clock_mhz": torch.cuda.clock_rate,
    "power_w": lambda: torch.cuda.power_draw() / 1e3,
    "temperature_c": torch.cuda.temperature,
}
EVERY_S = 0.2


def state():
    """PyTorch's GPU as it is now: {"sm_clock_mhz", ...}, None for what it does not tell; None without nvidia-smi."""
    try:  # by its name for life: nvidia-smi's numbers and CUDA's need not agree
        gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        command = ["nvidia-smi", f"--query-gpu={','.join(STATE.values())}", "--format=csv,noheader,nounits", gpu]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, AssertionError, RuntimeError):
        return None
    return dict(zip(STATE, map(_number, done.stdout.splitlines()[0].split(",")), strict=True))


@contextmanager
def watch(device, into):
    """Within, look at the GPU five times a second; afterwards `into` has median, low and high of what was seen.

    {"sm_clock_mhz": {"median", "low", "high"}, "power_w": ..., "temperature_c": ...}; nothing on a CPU, and without
    the package nvidia-ml-py, by which PyTorch asks.
    """
    seen, stop = {name: [] for name in WATCHED}, threading.Event()
    watcher = threading.Thread(target=_look, args=(seen, stop), daemon=True)
    if str(device).startswith("cuda"):
        watcher.start()
    try:
        yield
    finally:
        stop.set()
        if watcher.ident:
            watcher.join()
        for name, values in seen.items():
            if values:
                into[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _look(seen, stop):
    while not stop.wait(EVERY_S):
        for name, ask in WATCHED.items():
            try:
                seen[name].append(ask())
            except Exception:  # no package to ask by, or a GPU that does not tell this: NVML has errors of its own
                pass


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", on a laptop's GPU say
