"""What notebooks/01_baseline_fp32 kept."""

import pytest


def test_01_the_baseline_is_what_it_says(kept):
    seen = kept("01_baseline_fp32")
    assert seen["model"] == "pocket" and seen["dtype"] == "torch.float32"
    assert seen["processors"] == {"unet": ["AttnProcessor"], "vae": ["AttnProcessor"]}, "SDPA was left on"
    assert seen["flags"] == [False, True], "TF32 is allowed elsewhere than PyTorch allows it"
    assert seen["unet_calls"] == seen["steps"] == 30


def test_01_the_pictures_stay(kept):
    seen = kept("01_baseline_fp32")
    assert 0 < seen["latents_apart"] < 1e-3, "another way to attend, and the same attention"
    drift = seen["drift"]
    assert drift["exact"] or drift["psnr_db"] > 60, "plain attention changed the pictures more than summing order does"
    assert seen["objects"]["value"] > 0.8
    assert all(off < 1e-3 for off in seen["layer_off"].values()), "attention by hand is not the pipeline's"


def test_01_numbers_by_hand(kept):
    seen = kept("01_baseline_fp32")
    errors = seen["errors"]
    assert errors["float32"] < 1e-5 < 1e-4 < errors["TF32"] < 2e-3 < errors["bfloat16"] < 2e-2
    assert seen["scores_mib"] == {"pocket": [2.0, 4.0], "sd15": [1024.0, 64.0], "sdxl": [1280.0, 1024.0]}
    assert seen["gflop"] == pytest.approx(8.4, abs=0.1), "plain attention's products are not counted"
    assert {"aten.convolution", "aten.bmm"} <= set(seen["operations"])
    assert 0.01 < seen["share_of_rate"] < 2
    by_kind = lambda word: [value for name, value in sorted(seen["intensity"].items()) if word in name]
    (norm,), plain, convolutions, (fused,) = map(by_kind, ("norm", "plain", "convolution", "never"))
    assert norm < min(plain) and max(plain) < fused and max(plain) < min(convolutions)


def test_01_the_false_baseline_is_caught(kept):
    seen = kept("01_baseline_fp32")
    caught = seen["caught"]
    assert caught["vae"] and caught["TF32 (products, convolutions)"]
    assert not caught["unet"] and not caught["dtypes"]
    assert seen["looks"]["max_abs"] <= 3, "the point is that its picture does not tell"
