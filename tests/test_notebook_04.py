"""What notebooks/04_compile kept."""


def test_04_compile(kept):
    seen = kept("04_compile")
    assert (seen["model"], seen["kind"], seen["regions"]) == ("pocket", "regional", 11)
    assert 0 < seen["graphs"] <= 3 and seen["breaks"] == 0
    assert 0 < seen["unet_share"] < 1
    assert seen["first_call_s"] > seen["median_s"], "the first call did not compile"
    assert not seen["drift"]["exact"], "the pictures are those of the uncompiled pipeline"
    assert seen["drift"]["psnr_db"] > 40, "compiling changed the pictures more than rounding does"
    assert seen["objects"]["value"] > 0.8
    assert seen["strides"]["before"][1] > 1 and seen["strides"]["after"][1] == 1, "the weights are not channels_last"
    assert seen["layout"], "the step left the weights in the old layout"
    assert seen["looked_up"] == [1, 0], "the scheduler still looks its first step up"


def test_04_compile_fuses_breaks_and_compiles_again(kept):
    seen = kept("04_compile")
    assert len(seen["eager_kernels"]) == 3 and len(seen["kernels"]) == 1 and "group_norm" in seen["kernels"][0]
    assert seen["pair_error"] < 1e-4
    assert seen["broken"] == 2
    recompiles = dict(seen["recompiles"])
    changes = {name: recompiles.pop(name) for name in ("guidance cut off", "another dtype")}
    assert recompiles == {"first picture": 2, "second picture": 0, "cut off again": 0}
    assert set(changes.values()) <= {1, 2}, "one graph for both sizes of block, or one for each"
    assert seen["told"] == [True], "a global put back before the first call must not count"
    assert seen["diagnosis"] == "Data-dependent branching"
    assert seen["mended"] == 2 and seen["heard"] == 0
