"""What notebooks/02_bf16 kept."""


def test_02_bf16(kept):
    seen = kept("02_bf16")
    assert seen["model"] == "pocket" and seen["same_weights"]
    assert not seen["drift"]["exact"], "bf16 was not applied"
    assert seen["drift"]["psnr_db"] > 40, "bf16 changed the pictures more than rounding does"
    assert seen["objects"]["value"] > 0.8
    assert seen["finite"] == {"float32": True, "bfloat16": True, "float16": False}
