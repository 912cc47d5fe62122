"""What notebooks/12_cuda_graphs kept."""

import pytest
from tiny import computes_wide


def test_12_counts_what_a_call_asks_for_and_bounds_what_a_graph_gains(kept):
    seen = kept("12_cuda_graphs")
    assert seen["model"] == "pocket"
    casts = 2 if computes_wide() else 1  # each layer then casts what it reads and what it answers
    assert 400 < seen["operations"]["unet"] < casts * 800 and 30 < seen["operations"]["text_encoder"] < casts * 150
    assert 600 < seen["operations"]["sd15"] < 900
    sdpa, compiled = seen["waiting"]["sdpa"], seen["waiting"]["compile"]
    assert 0 < compiled["share"] < sdpa["share"] < 1 and compiled["kernels_ms"] < sdpa["kernels_ms"]
    assert 1 < compiled["most"] < sdpa["most"]
    assert 0 < seen["asking_s"] < seen["whole_s"]
    assert seen["predicted"] == pytest.approx(seen["whole_s"] / (seen["whole_s"] - seen["asking_s"]))
    # How much a tape gains is the machine's mood; it does the same work, so much less or more it cannot be.
    assert 0.5 < seen["gain"] < 3 and 0.5 < seen["gain_of_few"] < 5


def test_12_a_tape_replays_into_its_places_and_knows_nothing_else(kept):
    seen = kept("12_cuda_graphs")
    assert seen["small_tape"]["copied"] < 1e-6 and seen["small_tape"]["renamed"] > 0.1
    assert len(seen["replayed"]) == 2 and max(seen["replayed"]) < 1e-2
    assert "size" in seen["shapes"]["another size"] and seen["shapes"]["repeated"]
    assert seen["frozen"] == {"at 100": pytest.approx(-9), "largest": pytest.approx(10)}
    assert seen["weights"] == {
        "changed in place": {"right": True, "same_fingerprint": True},
        "moved": {"right": False, "same_fingerprint": False},
    }


def test_12_the_engine_keeps_computes_once_and_refuses(kept):
    seen = kept("12_cuda_graphs")
    assert seen["captures"] == [32, 48, 64, 48], "32 is used in between, and stays"
    # 11 cross-attentions have two products each for the prompt, 17 residual blocks one each for the time, of which one is
    # left, and 11 self-attentions three each, of which one is left
    saved = seen["step_products"]["eager"] - seen["step_products"]["engine"]
    assert saved == 2 * 11 + 17 - 1 + 2 * 11
    assert seen["once_off"] < 1e-4 and seen["gathered"] == [True, True, True]
    assert seen["reasons"]["stock"] is None and seen["reasons"]["FreeU"] == "FreeU is enabled"
    assert "unknown here, Mine" in seen["reasons"]["processor"]
    assert "needs a CUDA GPU" in seen["prepared"]["refused"]
    assert set(seen["rows"]) == {"sdpa"}, "a CPU has no row of the engine's"


def test_12_what_was_overwritten_guides_nothing_until_it_is_copied(kept):
    seen = kept("12_cuda_graphs")
    assert seen["strength"]["replayed"] == 0
    assert seen["strength"]["mended"] == pytest.approx(seen["strength"]["eager"], rel=0.05)
    assert seen["strength"]["eager"] > 0.05, "the prompt does nothing that could be lost"
    assert seen["mended"]["exact"] or seen["mended"]["psnr_db"] > 40
    assert not seen["broken"]["exact"] and seen["broken"]["psnr_db"] < 30
