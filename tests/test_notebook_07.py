"""What notebooks/07_tiny_vae kept."""


def test_07_tiny_vae(kept):
    seen = kept("07_tiny_vae")
    assert seen["model"] == "pocket"
    assert seen["decoder"] == "AutoencoderTiny" and seen["same_weights"], "the tiny VAE was not applied"
    assert seen["latents_exact"], "something before the decoder changed too"
    assert not seen["drift"]["exact"] and seen["drift"]["psnr_db"] > 28, "the tiny decoder's pictures are off"
    assert seen["objects"]["value"] > 0.8
    ratio = seen["ratio"]
    assert ratio["weights"] > 4 and ratio["flops"] > 2 and ratio["bytes"] > 1
    assert ratio["seconds"] > 1.2


def test_07_what_is_lost_is_fine_detail(kept):
    energy = kept("07_tiny_vae")["kept_energy"]
    assert 0.85 < energy[0] < 1.05 and 0 < energy[-1] < 0.6 < energy[0]


def test_07_distilled_students_and_the_wrong_scaling(kept):
    seen = kept("07_tiny_vae")
    small, larger = seen["students"].values()
    assert 12 < small < larger < seen["drift"]["psnr_db"]
    assert seen["broken_psnr_db"] < 25
    assert seen["clamped"]["tiny"] < 0.05 < seen["clamped"]["divided"]
