"""What notebooks/05_fused_qkv kept."""


def test_05_fused_qkv(kept):
    seen = kept("05_fused_qkv")
    assert seen["model"] == "pocket"
    # 11 blocks: 3 + 3 products a block, then qkv for the image, q and kv where the prompt is read
    assert seen["products"] == [66, 33] and seen["kinds"] == {"to_qkv": 11, "to_q": 11, "to_kv": 11}
    assert seen["flops"]["fused"] == seen["flops"]["separate"] > 1e9, "fusing changed the work"
    assert seen["extra_bytes"] == 11 * (3 * 128 * 128 + 2 * 128 * 192) * 2
    assert seen["difference"] < 0.05
    assert seen["drift"]["exact"] or seen["drift"]["psnr_db"] > 45, "fusing changed the pictures"
    assert seen["objects"]["value"] > 0.8


def test_05_a_lora_is_lost_by_diffusers_and_refused_by_sdopt(kept):
    seen = kept("05_fused_qkv")
    assert not seen["lora"]["exact"] and seen["lora"]["psnr_db"] < 40, "the LoRA does nothing that could be lost"
    assert seen["lost"]["exact"] or seen["lost"]["psnr_db"] > 45
    assert "pipe.fuse_lora()" in seen["refused"]
    assert seen["kept_lora"]["exact"] or seen["kept_lora"]["psnr_db"] > seen["lora"]["psnr_db"] + 5


def test_05_one_wide_product_does_the_work_of_three(kept):
    seen = kept("05_fused_qkv")
    # Which is ahead by how much is the machine's mood; far apart they cannot be.
    assert 0.3 < seen["gain_of_few_rows"] < 10 and 0.5 < seen["gain_of_much_work"] < 2
