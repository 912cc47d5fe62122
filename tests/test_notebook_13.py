"""What notebooks/13_fp8 kept."""

import pytest

from sdopt.engine import fp8

PRODUCT = 2 * (1 / 16) ** 2 / 3  # the square of what two factors are off by, each up to 1/16, evenly: no product is worse


def test_13_counts_what_could_be_in_fp8_and_what_the_rule_takes(kept):
    seen = kept("13_fp8")
    assert seen["model"] == "pocket" and not seen["real"]
    assert seen["shares"] == {"sdxl": pytest.approx(0.817, abs=0.002), "sd15": pytest.approx(0.672, abs=0.002),
                              "pocket": pytest.approx(0.768, abs=0.002)}  # fmt: skip
    assert seen["predicted_gain"] == pytest.approx(1 / (1 - seen["shares"]["sdxl"] / 2))
    assert seen["pays"]["pocket"] == 0, "its layers are small"
    assert 0.5 * seen["shares"]["sdxl"] < seen["pays"]["sdxl"] <= seen["shares"]["sdxl"]
    assert 0.8 * seen["shares"]["sd15"] < seen["pays"]["sd15"] < 0.95 * seen["shares"]["sd15"], "its smallest are left"
    assert fp8.pays(8192, 640, 5120) and not fp8.pays(512, 128, 1024), "what these shares follow from"


def test_13_the_formats_are_decoded_and_round_as_they_say(kept):
    seen = kept("13_fp8")
    assert seen["decoded_right"] == {"e4m3": True, "e5m2": True}
    # two NaNs, and -0 is 0; e5m2 has an infinity and three NaNs of each sign
    assert seen["formats"] == {"e4m3": [253, 448], "e5m2": [247, 57344], "int8": [255, 127]}
    assert 1 / 20 < seen["rounding"] < 1 / 16
    e4m3, e5m2, int8 = (seen["by_size"][name] for name in ("e4m3", "e5m2", "int8"))  # at 1, 2**-8 and 2**-16 of the largest
    assert e4m3[:2] == [pytest.approx(0.026, abs=0.002)] * 2 and 0.05 < e4m3[2] < 0.2
    assert e5m2 == [pytest.approx(0.051, abs=0.004)] * 3
    assert int8[0] < 0.005 and int8[1:] == [1, 1]


def test_13_signs_decide_whether_a_sum_averages_errors_out(kept):
    sums = kept("13_fp8")["sums"]
    for n in ("16", "256", "4096"):
        mixed, alike = sums[n]
        assert 0.025 < mixed < 0.045 and alike < mixed / 2
    assert sums["4096"][1] < sums["256"][1] / 1.5 < sums["16"][1] / 3


def test_13_an_outlier_ruins_int8_and_not_e4m3_and_one_scale_is_ruined_by_a_row(kept):
    seen = kept("13_fp8")
    off = seen["outliers"]
    kept_up = pytest.approx(0.026, abs=0.002)
    assert off["no outlier"]["e4m3, row"] == kept_up and off["no outlier"]["e4m3, tensor"] == kept_up
    channel, row = off["channel x 100"], off["row x 1,000,000"]
    assert channel["e4m3, row"] == kept_up and channel["e4m3, tensor"] == kept_up and channel["int8, row"] > 0.15
    assert row["e4m3, row"] == kept_up and row["e4m3, tensor"] > 0.99 and row["int8, row"] < 0.01
    assert seen["zeros_stay"]
    beyond, of, worst = seen["calibrated"]
    assert of == 88 + 34 and 10 < beyond < of and 1.2 < worst < 5, "a first step does not say what comes"
    assert 0.1 < seen["reached"][0] <= seen["reached"][1] <= 1, "the bound from the weights holds"
    assert 0.005 < seen["of_images"][0] <= seen["of_images"][1] < 0.1, "a group norm's is the farther off"


def test_13_a_layer_by_hand_is_torchs_and_sdopts(kept):
    seen = kept("13_fp8")
    one = seen["one_layer"]
    assert seen["multiplied"] == "torch._scaled_mm" and one["same"]
    assert one["by_hand"] == pytest.approx(one["theirs"], rel=0.02) and 0.01 < one["by_hand"] < PRODUCT**0.5
    assert max(one["apart"], one["emulated"], one["bf16"]) < 2**-8, "the result's own last digit"
    assert seen["same_bits"] == {"add_layer_norm": True, "geglu": True}
    for apart, fused in seen["passes"].values():
        assert apart - fused == pytest.approx(2, abs=0.001), "written once less, read once less, each two bytes a number"


def test_13_a_convolution_is_nine_shifted_products_if_there_are_zeros_between(kept):
    seen = kept("13_fp8")["convolution"]
    assert seen["equal"] and seen["wrong"] == pytest.approx([2 / 16, 2 / 16 + 2 * 14 / 512])
    assert seen["bf16"] < 2**-8 < seen["by_hand"] < PRODUCT**0.5
    assert seen["emulated"] < 2**-8 and seen["kernel"] < seen["by_hand"] / 8, "but for numbers that lie halfway"


def test_13_errors_of_layers_and_calls_are_as_predicted(kept):
    seen = kept("13_fp8")
    assert seen["predicted_error"] == pytest.approx(0.0375, abs=0.001)
    middle = seen["middle"]
    assert 0.0012 < middle["bf16"] < 0.0025
    for scales in fp8.SCALES:
        assert 8 * middle["bf16"] < middle[scales] < seen["predicted_error"]
    assert seen["explained"] == pytest.approx(middle["row"], rel=0.06) and seen["missed"] < 0.2
    calls = seen["whole_calls"]
    assert len(calls["bf16"]) == 4
    for way in ("fp8, a scale a row", "fp8, a scale a tensor"):
        for bf16, rounded, clipped in zip(calls["bf16"], calls[way], calls["clipped"]):
            assert bf16 < rounded < 0.05 and clipped > 3 * rounded


def test_13_the_picture_is_the_one_asked_for_as_far_as_six_can_say(kept):
    seen = kept("13_fp8")
    assert seen["adherence"]["bf16"]["objects"]["value"] > 0.8
    assert seen["adherence"]["fp8"]["objects"]["value"] > 0.8
    difference = seen["difference"]
    assert len(seen["decibels"]) == 6 and difference["n"] == seen["adherence"]["bf16"]["objects"]["n"]
    assert difference["low"] < -0.05 and difference["high"] > 0.05, "so few cannot tell a small difference"
    assert 28 < min(seen["decibels"]) and max(seen["decibels"]) < 70, "it changes little, and it changes"
    assert seen["rows"] == {}, "an emulation has no row of times"


def test_13_clipping_helps_int8s_many_and_nothing_of_e4m3(kept):
    seen = kept("13_fp8")
    many, _ = zip(*(seen["tricks"][name] for name in ("int8, whole", "int8, clipped")))
    assert many[1] < many[0] / 2
    (whole, everything), (clipped, lost) = (seen["tricks"][name] for name in ("e4m3, whole", "e4m3, clipped"))
    assert clipped > 0.9 * whole and lost > 5 * everything
    gated, convolved = seen["by_kind"]["ff.net.2"], seen["by_kind"]["resnets"]
    assert gated > 2 * convolved > 4 * max(seen["by_kind"][kind] for kind in ("attn1", "attn2.to_q", "ff.net.0"))
    assert all(broken < mended - 5 for broken, mended in zip(seen["broken"], seen["decibels"]))
