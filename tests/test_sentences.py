import pytest
from made_up import bench_result, kernels, peers_result, result, row

from sdopt import sentences
from sdopt.errors import UserError


def test_the_headline_ends_with_the_ninth_step_and_names_the_recommended_path():
    told = sentences.headline(bench_result())
    assert "by the baseline in 4.00 s and at the end of the path in 0.800 s: 5.0 times faster on Some GPU." in told
    assert "The path without int8 takes 0.500 s: 8.0 times faster than the baseline." in told
    assert "The weights are random" in told
    assert "random" not in sentences.headline(result())


def test_a_race_names_the_fastest_that_was_compiled_and_the_engines_rows_that_were_measured():
    made = peers_result()
    made["rows"] += [row("baseline_fp32", 10.0), row("engine_bf16", 0.8), row("whole_path_engine", 0.4, settings={"steps": 20})]
    told = sentences.race(made)
    assert told.startswith("Stable Diffusion XL, random weights (times are real, pictures are noise)")
    assert ": 10.00 s by the baseline, 1.60 s compiled (6.2x), 0.800 s on our engine (12.5x), " in told
    assert told.endswith("0.400 s by the whole path on it (25.0x)."), "in fp8 nothing was measured"


def test_without_a_baseline_there_is_no_sentence():
    part = result()
    part["rows"] = part["rows"][1:3]
    for sentence in (sentences.headline, sentences.race, sentences.budget):
        with pytest.raises(UserError, match="no baseline"):
            sentence(part)


def test_the_budget_says_what_is_left_beside_the_unet():
    told = sentences.budget(result())
    assert "a picture takes 800 ms, of which the UNet's 30 calls take 680 (text encoder 9, scheduler 6, " in told
    assert "the path would be 5.9 times faster than the baseline; it is 5.0 times faster." in told
    assert told.endswith("times faster."), "a CPU has no kernels to tell of"


def test_the_budget_counts_each_call_with_the_batch_it_had():
    told = sentences.budget(bench_result())
    # 8 calls of 10 ms and 12 of 6, of which a tenth is attention and half are products
    assert "busy for 152 ms of the calls' time, 8 of 10.0 ms on 2 samples and 12 of 6.0 ms on 1 sample; " in told
    assert "; by kind: attention 15, convolution 30, matrix product 76, other 30. " in told


def test_the_budget_of_a_path_without_a_cutoff_has_one_batch():
    made = bench_result()
    made["rows"] = made["rows"][:8]
    assert "busy for 300 ms of the calls' time, 30 of 10.0 ms on 2 samples; by" in sentences.budget(made)


def test_a_gpu_that_waits_is_told_of_by_the_last_row_that_is_not_compiled():
    made = bench_result()
    told = "at sdpa the UNet's calls take 1666 ms, and the kernels are busy for 300 of them."
    assert sentences.budget(made).endswith(told)
    sdpa = next(row for row in made["rows"] if row["id"] == "sdpa")
    sdpa["unet_kernels"] = [kernels(2, 1600 / 30)]
    assert "waits" not in sentences.budget(made)
