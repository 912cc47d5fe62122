import re
import statistics

import pytest
from made_up import IDS, bench_result, peers_result, result

from sdopt import report, results, tables


def by_name(told):
    """{row id: {column: cell}} of a study's table."""
    header, *lines = tables.table(told)
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_the_table_says_what_each_row_gained():
    rows = by_name(result())
    assert [(rows[i]["baseline /"], rows[i]["before /"]) for i in ("baseline_fp32", "bf16", "cfg_cutoff")] == [
        ("", ""),
        ("2.00x", "2.00x"),
        ("5.00x", "1.25x"),
    ]
    assert list(rows["bf16"].values())[-4:] == ["8/10", "3/5", "31.5 dB", "31.5 dB"]


def test_a_failed_row_is_told_and_not_compared_with():
    failed = result()
    failed["rows"][1] = {"id": "bf16", "label": "bf16", "settings": {}, "status": "failed: out of memory | again"}
    rows = by_name(failed)
    assert rows["bf16"]["median"] == "failed: out of memory | again"
    assert (rows["sdpa"]["baseline /"], rows["sdpa"]["before /"]) == ("2.04x", "")
    assert "bf16           failed: out of memory | again\n" in tables.text(failed)
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in tables.markdown(failed).splitlines() if line[:1] == "|"}
    assert len(cells) == 1, "every line of the grid has as many cells"


def test_without_a_baseline_nothing_is_compared_with_it_and_noise_has_no_quality():
    part = result(weights="random")
    part["rows"] = [row | {"quality": None} for row in part["rows"][1:3]]
    header, *lines = tables.table(part)
    assert header[-2:] == ["peak memory", "before /"]
    assert [line[-1] for line in lines] == ["", "1.02x"]


@pytest.mark.parametrize("made", [bench_result, peers_result])
def test_noise_is_named(made):
    assert "random weights (times are real, pictures are noise)" in tables.text(made())
    assert "random weights (times are real, pictures are noise)" in tables.markdown(made())
    assert "random" not in tables.text(made(weights="hub"))


def test_a_row_that_compiles_has_its_first_call_cold_and_warm():
    rows = by_name(bench_result())
    assert (rows["compile"]["first call"], rows["compile"]["warm"]) == ("213 s", "15.00 s")
    assert (rows["bf16"]["first call"], rows["bf16"]["warm"]) == ("6.00 s", "")
    assert "warm" not in tables.table(result())[0]


def test_a_first_call_that_compiled_nothing_is_not_called_cold():
    told = bench_result()
    told["rows"][3] |= {
        "first_call_s": 15.0,
        "first_calls": {"cold_s": None, "compiled": 0, "found": 2, "warm_s": 15.0},
    }
    compiled = by_name(told)["compile"]
    assert (compiled["first call"], compiled["warm"]) == ("", "15.00 s")
    assert any("compile 2 of 2" in remark for remark in tables.remarks(told))


def test_rows_beside_the_path_are_compared_with_the_baseline_alone():
    rows = by_name(bench_result())
    gains = {i: (rows[i]["baseline /"], rows[i]["before /"]) for i in list(rows)[8:]}
    assert gains == {
        "cfg_cutoff": ("5.00x", "1.25x"),
        "baseline_tf32": ("1.33x", ""),
        "baseline_strict": ("0.80x", ""),
        "recommended": ("8.00x", ""),
    }


def test_remarks_name_the_kind_of_compilation_the_layout_and_what_did_not_help():
    told = result()
    told["rows"][3] |= {"apart": {"channels_last": {"latency_s": {"median": 1.9}}}}
    told["rows"][5]["note"] = "slower than the step before (0.67x): because"
    assert tables.remarks(told) == [
        "compile and after: regional compilation, the UNet's attention blocks alone",
        "compile: the channels_last layout alone, uncompiled, takes 1.90 s",
        "int8: slower than the step before (0.67x): because",
    ]


def test_remarks_of_a_bench_say_how_it_ran():
    told = "\n".join(tables.remarks(bench_result()))
    assert "recommended (the path without int8)" in told
    assert told.count("; warm: ") == 1
    assert "left there already: fused_qkv 1 of 2" in told
    assert "math in baseline_fp32, bf16, baseline_tf32, baseline_strict; cudnn and flash in sdpa; " in told
    assert "cudnn in compile to cfg_cutoff, recommended" in told
    assert "SM clock 1,700 to 1,810 MHz (of at most 1,980), power 589 to 600 W (of at most 700)" in told
    assert "the VAE runs" not in told


def test_peers_have_the_medians_and_ratios_of_their_runs():
    told, rows = peers_result(), by_name(peers_result())
    medians = {r["id"]: statistics.median(r["latency_s"]["runs"]) for r in told["rows"] if r["status"] == "ok"}
    assert len(medians) == 9
    for i, median in medians.items():
        assert rows[i]["median"] == f"{median:.2f} s"
        for other in tables.AGAINST:
            assert rows[i][f"{other} /"] == ("" if i == other else f"{medians[other] / median:.2f}x")
    assert rows["compile_max_autotune"]["p20 to p80"] == "1.58 to 1.62"


def test_peers_say_what_a_unet_call_takes_and_who_attended():
    peer = by_name(peers_result())["sdpa_flash"]
    assert (peer["UNet, a call"], peer["VAE"], peer["attention"]) == ("62.3 ms", "198.0 ms", "flash")
    assert peer["what"] == "bf16, eager, SDPA by flash"


def test_a_failed_peer_says_why_and_the_others_stay():
    told = peers_result()
    assert by_name(told)["xformers"]["median"].startswith("failed: xformers cannot attend here")
    assert re.search(r"^xformers +attention by xformers +failed: .* SDPA does$", tables.text(told), re.MULTILINE)
    told["rows"][1] = {"id": "eager_bf16", "label": "bf16, eager", "settings": {}, "status": "failed: out of memory"}
    header = tables.table(told)[0]
    assert "eager_bf16 /" not in header, "there is nothing to compare with"
    assert by_name(told)["eager_fp16"]["compile_max_autotune /"] == "0.76x"


def test_a_study_in_which_nothing_worked_still_has_a_table():
    told = peers_result()
    told["rows"] = told["rows"][-1:]
    assert tables.table(told)[0] == ["peer", "what", "median"]
    assert tables.text(told | {"rows": []})


def test_peers_that_did_not_take_turns_with_each_other_are_told():
    told = peers_result()
    for row in told["rows"]:
        row["beside"] = ["eager_fp16"] if row["id"] == "eager_fp16" else ["all the others"]
    assert tables.remarks(told)[0].startswith("not all peers took turns with each other")
    told["rows"] = told["rows"][:1]
    assert not any("turns" in said for said in tables.remarks(told)), "there is nobody to take turns with"


def test_a_profile_that_was_refused_leaves_the_kernels_untold():
    for told in (peers_result(), bench_result()):
        for row in told["rows"]:
            row.get("as_run", {})["attention"] = None
        assert "attention in the UNet" not in tables.text(told)


def test_a_gain_over_the_step_before_needs_that_step():
    told = bench_result()
    told["rows"] = [row for row in told["rows"] if row["id"] != "bf16"]
    assert by_name(told)["sdpa"]["before /"] == "" and by_name(told)["compile"]["before /"]


def test_remarks_of_peers_say_how_they_were_measured():
    told = tables.remarks(peers_result())
    assert told[0] == "the peers took turns, a picture each, in another order in each of 5 rounds"
    assert "eager_fp16: the VAE runs in float32, the UNet in float16" in told
    assert told[-1] == "the GPU while all was timed, medians: SM clock 1,750 MHz (of at most 1,980)"


def test_the_published_figures_name_their_sources():
    content = results.read_json(report.ROOT / "figures" / "data" / "published.json")
    for row in content["rows"]:
        assert row["what"] and row["source"] and row["figures"]
        assert all(figure["name"] and figure["unit"] and figure["value"] > 0 for figure in row["figures"])
    page = tables.published(content)
    assert len(page.splitlines()) == 2 + len(content["rows"])
    assert "fp32 7.36, bf16 4.63, SDPA 3.31, compiled (max-autotune) 2.54, fused QKV 2.52, int8 2.43 s |" in page
    assert "[huggingface/diffusion-fast](https://github.com/huggingface/diffusion-fast)" in page
    assert "speed-up 2.15 x; before 29.51, after 29.46 CLIP score |" in page


def test_the_table_has_a_row_a_step():
    assert list(by_name(result())) == list(IDS)


def test_a_kernel_is_told_beside_what_it_replaces_and_a_copy():
    seconds = {"ours": 20e-6, "eager": 90e-6, "compiled": 30e-6, "copy": 16e-6}
    row = {"kernel": "geglu", "shape": [8192, 5120], "dtype": "bfloat16", "bytes": 64_000_000, "seconds": seconds}
    told = {"settings": {"dtype": "bfloat16"}, "metrics": {"fusions": [row]}}
    told["environment"] = bench_result()["environment"] | {"gpu": "Some GPU"}
    page = tables.kernels(told).splitlines()
    assert page[0].startswith("Some GPU, bfloat16; torch ")
    assert page[-1] == "| geglu | 8192 x 5120 | 90.0 us | 30.0 us | 20.0 us | 3,200 | 80% |"


def test_what_computes_in_float32_is_told():
    told = result()
    assert not any("instructions" in said for said in tables.remarks(told))
    for row in told["rows"][1:]:
        row["as_run"] = row.get("as_run", {}) | {"computes_in": "float32"}
    (said,) = (said for said in tables.remarks(told) if "instructions" in said)
    assert said.endswith("layers compute in float32 and round in bf16 to cfg_cutoff")
