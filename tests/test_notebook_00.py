"""What notebooks/00_measure_first kept."""

import pytest


def test_00_the_stages_are_those_of_one_picture(kept):
    seen = kept("00_measure_first")
    stages = dict(seen["stages_ms"])
    assert seen["model"] == "pocket" and seen["steps"] == 30
    assert stages.pop("unet_calls") == seen["steps"], "the UNet runs once a step"
    assert max(stages, key=stages.get) == "unet" and min(stages.values()) > 0
    by_hand = seen["by_hand_s"]
    assert set(by_hand) == {"text_encoder", "unet", "vae"} and min(by_hand.values()) > 0
    assert sum(by_hand.values()) <= seen["whole_s"], "stages of one call cannot take longer than the call"
    assert by_hand["unet"] > 0.5 * seen["whole_s"]


def test_00_timings_are_those_of_calls_that_were_waited_for(kept):
    seen = kept("00_measure_first")
    latency = seen["latency_s"]
    assert len(latency["runs"]) == 3 and seen["first_call_s"] > 0
    assert min(latency["runs"]) <= latency["p20"] <= latency["median"] <= latency["p80"] <= max(latency["runs"])
    assert seen["returned_s"] < 0.5 * seen["done_s"], "asking must be faster than the work"
    assert seen["blamed"] == "save" and seen["slowest"] == "denoise"
    assert seen["moved"]["mean"] > 0.1 and abs(seen["moved"]["median"]) < seen["moved"]["mean"]


def test_00_memory_trace_and_pictures(kept):
    seen = kept("00_measure_first")
    assert seen["peak_bytes"] > 100 * 2**20
    assert seen["freed_mib"] > 400 and seen["peak_kept"], "512 MiB were freed and the peak stayed"
    assert any("convolution" in name for name in seen["trace"]) and any("mm" in name for name in seen["trace"])
    assert seen["same_noise"], "rows would not start from the same noise"
    assert seen["repeated"], "the same prompt and noise gave another picture"
    assert seen["adherence"]["objects"]["value"] > 0.8
    everything = seen["adherence"]["prompts_all_right"]
    assert everything["n"] == 3 and everything["high"] - everything["low"] > 0.3, "three prompts cannot be that sure"
    if everything["value"] == 1:
        assert everything["low"] == pytest.approx(0.025 ** (1 / 3))
