"""What notebooks/08_dpm_20 kept."""


def test_08_dpm_20(kept):
    seen = kept("08_dpm_20")
    assert seen["model"] == "pocket" and seen["prediction_type"] == "v_prediction"
    assert seen["unet_calls"] == [30, 20]
    assert 1.3 < seen["bound"] < 1.5
    assert not seen["drift"]["exact"], "DPM++ was not applied"
    assert seen["drift"]["psnr_db"] > 35, "20 steps of DPM++ draw another picture than 30 of Euler"
    assert seen["objects"]["value"] > 0.8


def test_08_orders_and_the_loop_by_hand(kept):
    seen = kept("08_dpm_20")
    assert 0.85 < seen["orders"]["Euler"] < 1.15
    assert 1.7 < seen["orders"]["DPM++ 2M"] < 2.3
    assert min(seen["by_hand"].values()) > 38


def test_08_dpm_is_closer_at_equal_steps(kept):
    seen = kept("08_dpm_20")
    against = seen["against"]
    assert seen["references_agree"] > 42
    assert against["euler 5"] < against["euler 10"] < against["euler 20"]
    assert against["dpm 5"] < against["dpm 10"] < against["dpm 20"]
    assert all(against[f"dpm {steps}"] > against[f"euler {steps}"] + 1 for steps in (10, 20))
    assert against["dpm 20"] > 44


def test_08_misread_answers_are_noise(kept):
    seen = kept("08_dpm_20")
    broken, alike = seen["broken"], seen["alike"]
    assert broken["defaults"] < 20 and broken["epsilon"] < 20 < broken["defaults, type set"] < 44
    assert alike["v_prediction"] > 0.8 > alike["epsilon"]
