import subprocess
import time
import types

import pytest
import torch

from sdopt.bench import sensors


def test_on_a_cpu_there_is_nothing_to_watch():
    seen = {}
    with sensors.watch("cpu", seen):
        pass
    assert seen == {}


def test_what_is_seen_is_summed_up_and_what_is_not_told_left_out(monkeypatch):
    clocks = iter([1000, 1200, 1100, *[1100] * 1000])
    refused = lambda: (_ for _ in ()).throw(RuntimeError("not supported"))
    monkeypatch.setattr(sensors, "WATCHED", {"sm_clock_mhz": lambda: next(clocks), "power_w": refused})
    monkeypatch.setattr(sensors, "EVERY_S", 0.01)
    seen = {}
    with pytest.raises(ArithmeticError), sensors.watch("cuda", seen):
        time.sleep(0.3)
        raise ArithmeticError
    assert seen == {"sm_clock_mhz": {"median": 1100, "low": 1000, "high": 1200}}


def test_the_state_of_a_gpu_is_read_as_numbers(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="1980, 1980, 3201, 149.36, [N/A], 40\n")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: asked.append(command) or answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12ab"))
    assert sensors.state() == {
        "sm_clock_mhz": 1980.0, "sm_clock_max_mhz": 1980.0, "memory_clock_mhz": 3201.0, "power_w": 149.36,
        "power_limit_w": None, "temperature_c": 40.0,
    }  # fmt: skip
    assert asked[0][-1] == "--id=GPU-12ab", "the GPU that PyTorch uses, whatever nvidia-smi numbers it"
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError()))
    assert sensors.state() is None


@pytest.mark.gpu
def test_a_gpu_at_work_tells_its_clock_and_its_power():
    x, seen = torch.randn(4096, 4096, device="cuda"), {}
    with sensors.watch("cuda", seen):
        until = time.monotonic() + 2
        while time.monotonic() < until:
            x @ x
            torch.cuda.synchronize()
    assert seen["sm_clock_mhz"]["low"] > 0 and seen["power_w"]["high"] > 50
    assert sensors.state()["power_limit_w"] >= seen["power_w"]["median"]
