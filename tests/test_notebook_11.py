"""What notebooks/11_fused_kernels kept."""

import pytest


def test_11_fused_kernels(kept):
    seen = kept("11_fused_kernels")
    assert seen["model"] == "pocket"
    assert 0 < seen["share"] < 1 and 0.3 < seen["joined"] < 5
    # passes over memory, operation by operation and in one kernel; the norm's second reading is counted in both
    about = lambda passes: pytest.approx(passes, abs=0.02)  # weights and biases are a little more
    assert seen["passes"]["group_norm"] == about([5, 3]) and seen["passes"]["bias_residual"] == about([5, 3])
    assert seen["passes"]["add_layer_norm"] == about([5, 4]) and seen["passes"]["geglu"] == about([5, 3])


def test_11_the_kernels_are_right(kept):
    seen = kept("11_fused_kernels")
    assert set(seen["geglu_errors"]) == {"float32", "float16", "bfloat16"}
    assert all(error <= 1.01 for error in seen["geglu_errors"].values()), "further off than one step of the dtype"
    assert seen["same_as_ours"] < 1e-6
    assert "call .contiguous()" in seen["refused"]
    assert set(seen["norm_errors"]) == {"three steps", "sdopt's kernel"}
    assert all(error < 1e-3 for error in seen["norm_errors"].values()), "the variance is lost at a mean of 1000"
    assert all(error < 1e-5 for error in seen["doubled_errors"].values())
    assert seen["flops"]["four 2x2"] / seen["flops"]["3x3"] == pytest.approx(4 / 9)
    assert seen["flops"]["four 2x2"] < seen["flops"]["sdopt's"] < seen["flops"]["3x3"]


def test_11_a_variance_is_lost_far_from_zero_unless_it_is_shifted(kept):
    lost = kept("11_fused_kernels")["lost"]
    naive, shifted = ({middle: abs(off[k]) for middle, off in lost.items()} for k in (0, 1))
    assert naive["0"] < 1e-5 and naive["1000"] > 0.01 and naive["10000"] > 0.5
    assert len(shifted) == 5 and max(shifted.values()) < 1e-5


def test_11_the_unet_is_computed_with_them(kept):
    seen = kept("11_fused_kernels")
    assert seen["blocks"] == 33
    assert seen["launches"] == {
        "group_norm": 46, "bias_residual": 7, "shortcut": 10, "add_layer_norm": 33, "geglu": 11, "prompt_attention": 11,
        "upsample_conv": 2,
    }  # fmt: skip
    assert seen["unet_errors"]["fused"] < 2 * seen["unet_errors"]["eager"] < 1e-4
    assert 1.8 < seen["fewer"] < 2.2  # without cat


def test_11_a_mask_that_is_forgotten_shows_far_from_zero_alone(kept):
    seen = kept("11_fused_kernels")
    cases = ("64 columns, mean 0", "48 columns, mean 0", "48 columns, mean 3")
    kind, odd, far = map(seen["broken"].get, cases)
    assert kind < 1e-5 < odd < 0.2 and far > 0.3
    assert all(error < 1e-5 for error in seen["mended"].values()) and seen["layer_norm_error"] < 1e-5
