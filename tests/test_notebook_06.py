"""What notebooks/06_int8 kept."""

from tiny import computes_wide


def test_06_int8(kept):
    seen = kept("06_int8")
    assert seen["model"] == "pocket"
    assert seen["counts"] == {"int8": 90, "unused": 58, "time embedding": 19, "shortcut": 13, "prompt": 11}
    assert not seen["drift"]["exact"], "int8 was not applied"
    assert seen["drift"]["psnr_db"] > 30, "int8 changed the pictures more than rounding does"
    assert seen["objects"]["value"] > 0.8
    (whole, taken), (whole_after, taken_after) = seen["bytes_before"], seen["bytes_after"]
    assert 0.5 < taken_after / taken < 0.56 and taken - taken_after == whole - whole_after
    assert "int8 before compile" in seen["refused"]


def test_06_the_product_by_hand(kept):
    seen = kept("06_int8")
    assert seen["exact"]
    assert 0.0005 < seen["error"]["int8, a scale a row and a channel"] < 0.03
    assert seen["error"]["int8, a scale a row and a channel"] < seen["error"]["int8, one scale for the weight"]
    assert seen["by_hand"] < 0.02
    (spoiled, spared), (both, alike) = seen["outlier_levels"]
    assert max(spoiled, both, alike) < 10 and spared > 40
    assert seen["conv_difference"] < 1e-4


def test_06_the_filters(kept):
    seen = kept("06_int8")
    fewest, least = (2, 0.002) if computes_wide() else (5, 0.05)  # no instructions, and the largest left out
    assert fewest <= len(seen["gains"]) <= 5 and all(least < gain < 20 for gain in seen["gains"].values())
    agree, of = seen["sdxl_agree"]
    assert of == 533 and of - agree == 15
    ops, more = seen["operations"]
    assert more > 1.5 * ops
