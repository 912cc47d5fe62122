import json
from pathlib import Path

import pytest
import torch

from sdopt import results
from sdopt.bench import fusions, lessons
from sdopt.kernels import (
    add_layer_norm,
    bias_residual,
    geglu,
    group_norm,
    linear_geglu,
    prompt_attention,
    self_attention,
    shortcut,
    softmax,
    upsample_conv,
)

RECORDED = Path(__file__).parents[1] / "figures" / "data" / "nvidia-h200"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_kernels_are_named_timed_and_counted(fresh_compiler):
    product = lessons.products("cpu", (64,))
    assert [row["format"] for row in product] == ["float32", "TF32", "bfloat16", "int8"]
    assert all(row["tflops"] == pytest.approx(2 * 64**3 / row["seconds"] / 1e12) for row in product)
    asked = lessons.clock("cpu", 128)
    assert 0 < asked["asked_s"] <= asked["done_s"]
    (row,) = lessons.attentions("cpu", {"pocket": (2, 4, 64, 32)})
    assert {"formula", "PyTorch's pick", "flash", "math"} == set(row["seconds"]), "a CPU has no other backends"
    assert row["picked"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    (row,) = lessons.projections("cpu", ((64, 64),))
    assert set(row["launched_s"]) == set(row["kernels_s"]) == {"three", "one"}
    (row,) = lessons.linears("cpu", ((32, 64, 64),))
    assert set(row["seconds"]) == {"half", "int8", "int8_eager", "product"} and min(row["seconds"].values()) > 0


def test_fused_kernels_stand_beside_what_they_replace(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = [(1, 32, 2, 3), (1, 32, 2, 3), (1, 8, 8, 16, 2), (3, 16), (3, 32), (1, 4, 2, 3), (2, 40), (3, 8), (1, 2, 16), (1, 2, 16)]
    kernels = [group_norm, bias_residual, shortcut, add_layer_norm, geglu, upsample_conv, softmax, linear_geglu]
    kernels += [prompt_attention, self_attention]
    rows = fusions.fusions("cpu", list(zip(kernels, shapes)), repeats=1, rounds=1)
    assert [(row["kernel"], row["shape"]) for row in rows] == [(k.NAME, list(s)) for k, s in zip(kernels, shapes)]
    moved = [2 * 2 * 192, 2 * 3 * 192, 2 * (2 * 32 + 256 + 2 * 64), 2 * 4 * 48, 3 * 96, 2 * (24 + 144 + 96), 6 * 80, 2 * (24 + 512 + 96)]
    moved += [2 * (2 * 32 + 2 * 77 * 16), 2 * 4 * 32]
    assert [row["bytes"] for row in rows] == moved
    for row in rows:
        more = {"apart"} if row["kernel"] == linear_geglu.NAME else set()
        assert set(row["seconds"]) == {"ours", "eager", "compiled", "copy"} | more and min(row["seconds"].values()) > 0


def test_the_doubling_is_timed_with_its_weights_folded(monkeypatch):
    """As the engine keeps them: once a picture, and not at every call."""
    x, weight, bias, quarters = fusions._arguments(upsample_conv, (1, 4, 2, 3), "cpu", torch.float32)
    assert torch.equal(quarters, upsample_conv.folded(weight))
    theirs = upsample_conv.reference(x, weight, bias, quarters)
    monkeypatch.setattr(upsample_conv, "folded", None)
    assert (upsample_conv.upsample_conv(x, weight, bias, quarters) - theirs).abs().max() < 1e-5


def test_the_tradeoff_draws_what_its_rows_say():
    told = []
    variants = (lessons.Variant("euler", 3), lessons.Variant("dpm", 4, 0.0), lessons.Variant("dpm", 4, 0.5, "tiny"))
    rows = lessons.tradeoff(
        "cpu", variants, prompts=3, runs=1, batch=2, tell=lambda rows: told.append(json.dumps(rows))
    )
    assert '"quality": null' in told[0], "times are told before any picture is judged"
    assert [row["id"] for row in rows] == ["euler_3_cutoff_1_full", "dpm_4_cutoff_0_full", "dpm_4_cutoff_0.5_tiny"]
    assert [row["stages_ms"]["unet_calls"] for row in rows] == [3, 4, 4]
    assert all(row["quality"]["prompts_all_right"]["n"] == 3 for row in rows)
    far = [row["quality"]["against_60_steps"]["value"] for row in rows]
    assert all(15 < db < 50 for db in far), "the pictures are those of the reference's prompts and noise"


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lessons.main(["kernels", "--out", str(tmp_path)]) == 2
    assert "where there is one" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_the_notebooks_say_of_the_recorded_tradeoff_is_in_the_file():
    rows = {row["id"]: row for row in results.read(RECORDED / "pocket-tradeoff.json")["rows"]}
    right = {name: row["quality"]["prompts_all_right"] for name, row in rows.items()}
    assert all(share["n"] == 768 for share in right.values())
    apart = lambda a, b: right[a]["high"] < right[b]["low"] or right[b]["high"] < right[a]["low"]
    # 08: with 5 steps the better solver is the worse one, from 10 on the oracle cannot tell them apart, decibels can
    assert right["dpm_5_cutoff_1_full"]["high"] < right["euler_5_cutoff_1_full"]["low"]
    assert not any(apart(f"dpm_{n}_cutoff_1_full", f"euler_{n}_cutoff_1_full") for n in (10, 20, 30))
    assert not apart("dpm_10_cutoff_1_full", "dpm_30_cutoff_1_full")
    near = {name: row["quality"]["against_60_steps"]["value"] for name, row in rows.items()}
    assert all(near[f"dpm_{n}_cutoff_1_full"] > near[f"euler_{n}_cutoff_1_full"] + 3 for n in (10, 20, 30))
    # 09: no guidance costs a fifth of the prompts; from 0.4 on little is lost; 5 steps are better cut off; time is not saved
    value = lambda steps, cutoff: right[f"dpm_{steps}_cutoff_{cutoff}_full"]["value"]
    for steps in (10, 20, 30):
        assert 0.75 < value(steps, 0) < 0.82 and 0.005 < value(steps, 1) - value(steps, 0.4) < 0.025
        assert not apart(f"dpm_{steps}_cutoff_0.4_full", f"dpm_{steps}_cutoff_1_full")
        assert apart(f"dpm_{steps}_cutoff_0.2_full", f"dpm_{steps}_cutoff_1_full")
        medians = [rows[f"dpm_{steps}_cutoff_{c:g}_full"]["latency_s"]["median"] for c in lessons.CUTOFFS]
        assert max(medians) < 1.12 * min(medians)
    assert right["dpm_5_cutoff_1_full"]["high"] < right["dpm_5_cutoff_0.6_full"]["low"]
    # 07: the tiny decoder loses nothing that the oracle sees
    assert not apart("euler_30_cutoff_1_full", "euler_30_cutoff_1_tiny")


def test_what_the_notebooks_say_of_the_recorded_kernels_is_in_the_file():
    found = results.read_json(RECORDED / "kernels.json")["metrics"]
    ms = {layer["model"]: layer["seconds"] for layer in found["attentions"]}
    for name in ("sd15", "sdxl"):  # 03
        order = sorted((kind for kind in ms[name] if kind != "PyTorch's pick"), key=ms[name].get)
        assert order == ["cudnn", "flash", "efficient", "formula", "math"]
    rate = {(p["size"], p["format"]): p["tflops"] for p in found["products"]}  # 06
    assert rate[4096, "int8"] < 1.05 * rate[4096, "bfloat16"] and rate[8192, "int8"] > 1.2 * rate[8192, "bfloat16"]
    layers = [layer["seconds"] for layer in found["linears"]]  # 06: not even the product alone beats the whole layer
    assert layers and all(s["half"] < s["int8"] and s["half"] < 1.05 * s["product"] for s in layers)
    gain = [
        p["kernels_s"]["three"] / p["kernels_s"]["one"] for p in found["projections"]
    ]  # 05: much for small products
    assert gain[0] > 2 and max(gain[1:]) < 1.2
    assert found["clock"]["asked_s"] < 0.01 * found["clock"]["done_s"]  # 00
    # 11: GEGLU's 20 operations for 6 bytes, the most of the fused kernels, lie below what the GPU offers without tensor cores
    assert 20 / 6 < max(p["tflops"] for p in found["products"] if p["format"] == "float32") / 4.8


def test_what_notebook_12_says_of_recorded_waits_is_in_the_files():
    found = results.read_json(RECORDED / "kernels.json")["metrics"]["projections"]
    launched = [p["launched_s"]["three"] for p in found]  # about the same time whatever the size: the CPU's
    assert found[0]["rows"] == min(p["rows"] for p in found) and max(launched) < 1.05 * launched[0], "none above the smallest's"
    assert max(launched) < 1.1 * min(launched) and max(launched) > 6 * found[0]["kernels_s"]["three"]
    rows = {row["id"]: row for row in results.read(RECORDED / "sd15-path.json")["rows"]}
    waits = {}
    for name in ("sdpa", "compile"):
        (call,), stages = rows[name]["unet_kernels"], rows[name]["stages_ms"]
        waits[name] = stages["unet"] - stages["unet_calls"] * sum(call["ms"].values())
    assert waits["sdpa"] > 0.5 * rows["sdpa"]["stages_ms"]["unet"], "launch-bound"
    assert waits["compile"] < 0.1 * rows["compile"]["stages_ms"]["unet"], "almost no waiting is left"
    picture, compiled = (1e3 * rows[name]["latency_s"]["median"] for name in waits)
    assert picture / compiled > picture / (picture - waits["sdpa"]), "the compiler gained more than the bound"
