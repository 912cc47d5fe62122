"""What notebooks/14_is_it_still_the_same_picture kept."""

import pytest

NAME = "14_is_it_still_the_same_picture"


def test_14_by_hand_is_what_sdopt_says(kept):
    seen = kept(NAME)
    assert seen["model"] == "pocket" and seen["count"] == 12
    assert seen["psnr_agrees"] and seen["interval_agrees"] and seen["counts_agree"] and seen["frechet_agrees"]
    assert seen["kept_share"] > 0.9, "four directions hold most of what renders differ in"


def test_14_pairs_narrow_the_interval(kept):
    seen = kept(NAME)
    (low, high), (paired_low, paired_high) = seen["unpaired"], seen["paired"]
    assert low < paired_low < paired_high < high
    assert paired_high - paired_low < 0.6 * (high - low)
    lost = seen["lost"]
    assert -0.5 < lost["low"] < lost["value"] < lost["high"] < 0


def test_14_drift_orders_by_change_and_not_by_harm(kept):
    seen = kept(NAME)
    rows = seen["rows"]
    order = sorted(rows, key=lambda way: rows[way]["psnr"])
    assert order == ["another seed", "3 steps", "tiny VAE", "one pixel", "fp32"]
    assert seen["sure"] == ["3 steps"], "nothing else clearly loses objects, not even what drifts most"
    assert seen["reference"]["value"] == 1
    for way in ("one pixel", "tiny VAE"):  # drift without loss, after the latents
        assert rows[way]["psnr"] < rows["fp32"]["psnr"] - 2 and rows[way]["cosine"] == pytest.approx(1)
        assert rows[way]["objects"]["value"] == 0
    assert rows["another seed"]["cosine"] < 0.9 < rows["3 steps"]["cosine"] < rows["fp32"]["cosine"]


def test_14_a_wrong_colour_is_close_by_psnr_and_by_frechet(kept):
    seen = kept(NAME)
    facts, found = seen["facts"], seen["of_renders"]
    assert facts["renders"]["value"] == facts["one pixel"]["value"] == 1
    assert facts["recoloured"]["value"] == pytest.approx(1 - seen["count"] / facts["renders"]["n"]), "one in each"
    assert seen["closer"] >= 9 and min(found["recoloured"]) > 25
    assert sum(found["recoloured"]) > sum(found["one pixel"])
    assert max(seen["distances"].values()) < 0.5, "the features look at the setting"


def test_14_shuffled_pictures_are_as_near_and_wrong(kept):
    shuffled = kept(NAME)["shuffled"]
    assert shuffled["after"] == pytest.approx(shuffled["before"], rel=1e-9) and shuffled["before"] > 1
    assert shuffled["objects"]["value"] < 0.3


def test_14_few_pictures_are_too_far_from_their_own_kind(kept):
    curve = {int(n): values for n, values in kept(NAME)["curve"].items()}
    distances = [curve[n][0] for n in sorted(curve)]
    assert sorted(curve) == [8, 12, 24, 48] and distances == sorted(distances, reverse=True) and distances[-1] > 1
    scaled = [n * distance for n, (distance, _) in curve.items()]
    assert max(scaled) < 2.5 * min(scaled), "about as 1/n"
    assert all(0.5 * distance < bias < 2 * distance for distance, bias in curve.values()), "the estimate's size is right"
    assert kept(NAME)["shuffled"]["before"] < curve[12][0], "the renders of the same prompts are nearer than random ones"


def test_14_the_oracle_reads_through_grain(kept):
    noisy = kept(NAME)["noisy"]
    psnr, ssim = ([noisy[level][measure] for level in ("5", "20", "40")] for measure in ("psnr", "ssim"))
    assert psnr == sorted(psnr, reverse=True) and ssim == sorted(ssim, reverse=True) and ssim[-1] < 0.15
    assert all(row["objects"]["value"] > -0.1 for row in noisy.values())


def test_14_drift_notices_first_what_can_be_noticed(kept):
    seen = kept(NAME)
    needed = seen["needed"]
    assert needed["no guidance"]["drift"] == 4, "with the fewest that are asked"
    assert needed["no guidance"]["adherence"] is None and needed["no guidance"]["Frechet"] is None
    assert seen["broken"]["no guidance"]["psnr"] < seen["rows"]["fp32"]["psnr"] - 10
    assert set(needed["middle layer"].values()) == {None}
    assert seen["broken"]["middle layer"]["psnr"] > seen["rows"]["fp32"]["psnr"] - 5
    assert seen["put_back"]


def test_14_finds_its_cases_in_the_recorded_study(kept):
    found = kept(NAME)["cases"]["nvidia-h200"]
    assert found["nearer"][0] == "unipc_4_steps" and found["farther"][0] == "euler_6_steps"
    assert found["twins"] == ["unipc_8_steps", "euler_10_steps"]
