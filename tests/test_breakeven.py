import pytest
import torch
from made_up import break_even_result, row

from sdopt import breakeven, compilation, tables
from sdopt.bench import recipes, studies
from sdopt.breakeven import Way, pictures


def way(first_s, each_s, spread=0.0):
    latency = {"median": each_s, "p20": each_s - spread, "p80": each_s + spread}
    return Way("x", "x", False, first_s, latency)


@pytest.mark.parametrize(
    ("first_s", "each_s", "after"),
    [(5.0, 9.0, 1), (7.0, 1.0, 3), (7.5, 1.0, 4), (105.0, 1.0, 101), (7.0, 2.0, None), (7.0, 2.5, None), (1e9, 1.999, None)],
)
def test_a_way_has_paid_back_at_the_first_picture_that_is_as_soon(first_s, each_s, after):
    eager, other = way(5.0, 2.0), way(first_s, each_s)
    assert pictures(other, eager) == after
    if after and after > 1:
        assert other.after(after) <= eager.after(after) and other.after(after - 1) > eager.after(after - 1)


def test_the_spread_of_both_ways_gives_the_soonest_and_the_latest():
    slow, fast = way(5.0, 2.0, 0.1), way(105.0, 1.0, 0.1)
    assert pictures(fast, slow, "p20", "p80") == 85 and pictures(fast, slow, "p80", "p20") == 126


def test_a_row_that_compiles_begins_cold_or_warm_and_preparing_counts():
    found = {w.name: w.first_s for w in breakeven.ways(break_even_result())}
    assert found == {
        "eager_bf16": 0.5 + 6.0,
        "compile_reduce_overhead": 0.5 + 170.0,
        "compile_reduce_overhead, warm": 0.5 + 17.0,
        "compile_max_autotune": 0.5 + 160.0,
        "compile_max_autotune, warm": 0.5 + 16.0,
        "compile_regional": 0.5 + 40.0,
        "compile_regional, warm": 0.5 + 8.0,
        "engine_bf16": 1.0 + 9.0,
    }
    calls = {"cold_s": None, "compiled": 0, "found": 2, "warm_s": 8.0}
    assert [w.warm for w in breakeven.ways({"rows": [row("compile_regional", 1.0, first_calls=calls)]})] == [True]


def test_the_table_says_when_each_has_paid():
    told = break_even_result()
    told["rows"].append({"id": "tutorial_recipe", "label": "y", "settings": {}, "status": "failed: out of memory"})
    header, *lines = tables.table(told)
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert rows["eager_bf16"]["paid back after"] == ""
    assert rows["engine_bf16"]["paid back after"] == "5 pictures" and rows["engine_bf16"]["by then"] == "14.00 s"
    assert rows["compile_reduce_overhead"]["paid back after"] == "548 pictures"
    assert rows["compile_reduce_overhead"]["between"] == "488 and 625"
    assert rows["compile_regional"]["paid back after"] == "never", "it is slower than eager"
    assert "failed: out of memory" in tables.text(told) and breakeven.RULE in tables.text(told)
    alone = told | {"rows": told["rows"][1:]}
    assert len(tables.table(alone)) == 2, "without eager_bf16 there is nothing to compare with"


def test_the_study_is_five_of_the_peers_rows_and_ours():
    rows = studies.rows_of(studies.study("sdxl-break-even"), "cuda", 30)
    ids = ["eager_bf16", "compile_reduce_overhead", "compile_max_autotune", "compile_regional", "engine_bf16"]
    assert [r.id for r in rows] == ids and [r.compiles for r in rows] == [False, True, True, True, False]


def test_regional_compilation_is_diffusers_own(pocket, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: asked.append((type(module).__name__, how)))
    recipes.regional(pocket)
    assert set(map(repr, asked)) == {repr(("BasicTransformerBlock", {"fullgraph": True}))} and len(asked) > 2
    assert pocket.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert compilation.compiled_kind(pocket) is None, "of the test: nothing was compiled"


def test_a_new_size_is_told_with_its_second_picture():
    new = {"height": 768, "width": 1024, "first_s": 2.5, "second_s": 0.625}
    rows = [row("eager_bf16", 1.0), row("engine_bf16", 0.5) | {"other_size": new}, row("engine_fp8", 0.4) | {"other_size": new}]
    (said,) = breakeven.first_calls(rows)
    assert said == (
        "a size not drawn before, 768x1024, its first picture: engine_bf16 2.50 s, then 0.625 s; engine_fp8 2.50 s, then 0.625 s"
    )
