"""What notebooks/03_sdpa kept."""


def test_03_sdpa(kept):
    seen = kept("03_sdpa")
    assert seen["model"] == "pocket"
    assert seen["online_error"] < 1e-5, "softmax in blocks is no longer the formula"
    largest = seen["largest_mib"]
    assert largest["plain"] > 25 and largest["in_blocks"] < 5 and largest["scaled_dot_product_attention"] < 10
    flash = ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert seen["picked"] == seen["unet_picked"] == flash, "the UNet does not attend by PyTorch's own choice"
    assert seen["ran"]["math"] == seen["ran"]["flash"] == ["float32", "bfloat16"]
    assert not seen["drift"]["exact"], "the UNet still attends as before"
    assert seen["drift"]["psnr_db"] > 40, "SDPA changed the pictures more than rounding does"
    assert seen["objects"]["value"] > 0.8


def test_03_sdpa_a_backend_is_pinned_by_sdpa_and_not_by_the_switch(kept):
    seen = kept("03_sdpa")
    assert seen["asked"] == seen["unet_picked"]
    assert seen["pinned"] == ["aten::_scaled_dot_product_attention_math"]
