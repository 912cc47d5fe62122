import pytest
from made_up import stages_result

from sdopt import stagetables, tables


def cells(told):
    header, *lines = tables.table(told)
    return {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}


def test_each_stage_of_each_row_stands_beside_its_prediction_and_the_ceilings():
    found = cells(stages_result())
    assert len(found) == 4 * 10
    unet = found["compile", "UNet"]  # 1,360 ms for 200 TFLOP and 1 TB
    assert (unet["run"], unet["predicted"], unet["measured"], unet["limit"]) == ("fused", "600 ms", "1,360 ms", "arithmetic")
    assert (unet["measured / predicted"], unet["TFLOP"], unet["TFLOP/s"], unet["of its ceiling"]) == ("2.3x", "200", "147", "21%")
    assert (unet["GB"], unet["GB/s"], unet["of a copy's"]) == ("1,000", "735", "18%")
    assert found["compile", "scheduler"]["TFLOP"] == "", "it calculates no product"


def test_a_stage_in_two_formats_is_held_against_both_ceilings():
    baseline = cells(stages_result())["baseline_fp32", "UNet"]
    # 75 TFLOP at 50 and 100 at 400 TFLOP/s are 1.75 s at best, of 3.4
    assert baseline["of its ceiling"] == "51%" and baseline["TFLOP"] == "175"


def test_a_failed_row_has_its_reason_in_its_place():
    told = stages_result()
    told["rows"][1] = {"id": "bf16", "label": "bf16", "settings": {}, "status": "failed: out of memory"}
    assert "bf16           failed: out of memory\n" in tables.text(told)
    assert stagetables.remarks({"rows": told["rows"][1:2]}) == []


def test_the_stages_are_held_against_the_whole():
    told = stages_result()
    (whole,) = [said for said in tables.remarks(told) if said.startswith("the stages add up to")]
    assert "add up to 93.4% (baseline_fp32) to 94.9% (cfg_cutoff) of the call" in whole
    assert "1.01 to 1.01 times the median" in whole
    told["rows"][4]["roofline"]["call_ms"] /= 2
    assert "more than the whole, so not to be trusted: fused_qkv" in tables.remarks(told)


def test_the_ceilings_are_told_with_their_rule():
    said = "\n".join(tables.remarks(stages_result()))
    assert "TF32 400, bfloat16 700, float32 50; a copy 4,000 GB/s; starting an operator 4.0 us" in said
    assert stagetables.RULE in said and "SM clock" in said


def test_kernels_by_kind_have_their_rates():
    told = stagetables.rates(stages_result())
    # compile: 30 calls of 10 ms, half of them products: 60 TFLOP in 150 ms; the calls take 1,360
    assert "| compile | 150 ms, 400 TFLOP/s | 60 ms | 30 ms | 60 ms | 1,060 ms |" in told
    assert told.count("\n| ") == 2 + 9, "the header and nine rows: the engine's has no profile"


@pytest.mark.parametrize(("value", "told"), [(0.000241, "0.000241"), (12.34, "12.3"), (1234.5, "1,234")])
def test_numbers_have_three_digits(value, told):
    assert stagetables._three(value) == told
