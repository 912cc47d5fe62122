"""What notebooks/10_the_whole_path kept."""

import math

from sdopt import path


def test_10_the_whole_path(kept):
    seen = kept("10_the_whole_path")
    assert seen["model"] == "pocket"
    assert set(seen["ids"]) == {step.id for step in path.STEPS} - {"int8"}
    assert seen["order"] == list(path.ORDER) and seen["order"][-1] == "compile"
    assert seen["unet_calls"] == 20 and seen["baseline_calls"] == 30
    assert seen["batches"] == [2] * 8 + [1] * 12, "guidance was not cut after 40 % of 20 steps"
    assert seen["same_as_by_hand"]


def test_10_the_whole_path_still_draws_what_was_asked_for(kept):
    seen = kept("10_the_whole_path")
    assert not seen["drift"]["exact"], "the path changed nothing"
    assert seen["drift"]["psnr_db"] > 25
    assert seen["objects"]["value"] > 0.8
    assert seen["speedup"] > 1 and seen["first_call_s"] > 0


def test_10_the_whole_path_refuses_what_comes_too_late(kept):
    assert kept("10_the_whole_path")["refused"] == ["fused_qkv", "int8", "tiny_vae", "dpm_20"]


def test_10_the_whole_path_keeps_the_books(kept):
    seen = kept("10_the_whole_path")
    assert "pocket on cpu-2-cores" in seen["products"] and seen["products"].keys() == seen["verdicts"].keys()
    for product in seen["products"].values():
        assert math.isclose(product["in_place"], product["whole"], rel_tol=1e-9), "gains in place multiply to the whole"
        assert product["alone"] > 1 and not math.isclose(product["alone"], product["whole"], rel_tol=1e-3)
    for verdict in seen["verdicts"].values():
        judged = [step.split()[0] for steps in verdict.values() for step in steps]
        assert len(judged) == len(set(judged)) and set(judged) < {step.id for step in path.STEPS}
