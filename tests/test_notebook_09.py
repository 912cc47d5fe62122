"""What notebooks/09_cfg_cutoff kept."""


def test_09_cfg_cutoff(kept):
    seen = kept("09_cfg_cutoff")
    assert seen["model"] == "pocket"
    assert seen["batches"] == seen["by_hand_batches"] == [2] * 8 + [1] * 12, "guidance was not cut after 40 % of 20"
    assert seen["unet_calls"] == 20 and seen["same_as_by_hand"]
    # the first step, which no callback precedes, and then from 20 % to 60 %
    assert seen["interval_batches"] == [2] + [1] * 3 + [2] * 8 + [1] * 8
    assert seen["by_hand_error"] < 1e-2, "one guided step by hand is not what the pipeline does"
    assert seen["early_term"] > 2 * seen["late_term"]
    assert seen["pictures"] == 20


def test_09_cfg_cutoff_costs_little_at_40_percent(kept):
    seen = kept("09_cfg_cutoff")
    psnr, objects = seen["psnr"], seen["objects"]
    assert psnr["1"] is None, "a cutoff of 1 is full guidance, and the same pictures"
    assert psnr["0"] < psnr["0.2"] < psnr["0.4"] < psnr["0.6"]
    assert psnr["0.4"] > 36 and psnr["0"] < 35
    assert objects["0.4"] == objects["1"] and objects["0.4"] > 0.8


def test_09_cfg_cutoff_breaks_as_told(kept):
    seen = kept("09_cfg_cutoff")
    assert seen["loud"], "diffusers' own callback no longer fails with two prompts: say so in the notebook"
    assert seen["silent_psnr"] < seen["psnr"]["0.4"] - 3, "the wrong half drew as good a picture"
