"""What fp8 gains by shape and costs by layer: measured small on a CPU, and the engine's rule against the recorded sweep."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from test_engine import captured, tiny  # noqa: F401 (fixtures)
from test_engine_fp8 import CONVOLUTIONS, by_reference, rounding  # noqa: F401

from sdopt import engine, quantization, results
from sdopt.bench import lessons
from sdopt.bench import rounding as study
from sdopt.drawing import Task
from sdopt.engine import fp8
from sdopt.kernels import launch, linear_geglu, to_float8

RECORDED = Path(__file__).parents[1] / "figures" / "data" / "nvidia-h200"
recorded_sweep = pytest.mark.skipif(
    not (RECORDED / "fp8-shapes.json").exists(), reason="the sweep fp8-shapes is not recorded yet"
)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU is there, and Triton compiles for it")
@torch.no_grad()
def test_every_layer_of_a_transformer_is_timed_with_what_rounds_for_it(monkeypatch):
    monkeypatch.setattr(study, "CACHE", 0)  # one set of inputs is enough
    rows = study.shapes("cpu", sizes=((2, 16),), repeats=1, rounds=1)
    assert [(row["layer"], row["inputs"], row["outputs"], row["before"]) for row in rows] == [
        ("self-attention", 16, 48, "add_layer_norm"),
        ("cross-attention", 16, 16, "add_layer_norm"),
        ("feed-forward 1", 16, 128, "add_layer_norm"),
        ("feed-forward 2", 64, 16, "geglu"),
        ("output", 16, 16, None),
    ]
    products = {"bf16", "row", "tensor", "pass_row", "pass_tensor"}
    for row in rows:
        before = {f"before_{way}" for way in ("bf16", "row", "tensor")} if row["before"] else set()
        gated = {f"gated_{way}" for way in ("bf16", "row", "tensor")} if row["layer"] == "feed-forward 1" else set()
        assert set(row["seconds"]) == products | before | gated and min(row["seconds"].values()) > 0


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU is there, and Triton compiles for it")
@torch.no_grad()
def test_convolutions_are_timed_in_both_formats(monkeypatch):
    monkeypatch.setattr(study, "CACHE", 0)
    (row,) = study.convolutions("cpu", {"tiny": ((4, 16, 32),)}, samples=1, repeats=1, rounds=1)
    assert {key: row[key] for key in ("model", "samples", "lines", "inputs", "outputs")} == {
        "model": "tiny", "samples": 1, "lines": 4, "inputs": 16, "outputs": 32
    }  # fmt: skip
    assert set(row["seconds"]) == {"bf16", "e4m3"} and min(row["seconds"].values()) > 0


def made_up(size, bf16, row, before=(1.0, 1.0)):
    seconds = {"bf16": bf16, "row": row, "pass_row": 5.0, "before_bf16": before[0], "before_row": before[1]}
    return {"rows": size, "inputs": 16, "outputs": 16, "before": "geglu", "seconds": seconds}


def test_the_rule_is_what_makes_all_layers_fastest_together():
    rows = [made_up(2**18, 1.0, 1.2), made_up(2**20, 2.0, 1.9, (1.0, 1.2)), made_up(2**21, 4.0, 3.0), made_up(2**23, 9.0, 5.0)]
    assert study.whole(rows[0], "row") == 2.2 and study.whole(rows[1], "row") == pytest.approx(3.1)
    assert study.whole(rows[0] | {"before": None}, "row") == 6.2 and study.whole(rows[0] | {"before": None}, "bf16") == 1.0
    assert study.fewest(rows) == 2**29
    assert study.fewest([made_up(2**18, 1.0, 0.5)]) <= 2**26
    image = lambda samples, bf16, e4m3: {
        "samples": samples, "lines": 2**8, "inputs": 16, "outputs": 16, "seconds": {"bf16": bf16, "e4m3": e4m3}
    }  # fmt: skip
    images = [image(1, 1.0, 1.5), image(2, 2.0, 2.1), image(4, 3.0, 2.5)]  # of 9/8 * 2**27 multiplications, and twice that
    assert [study.multiplications(row) for row in images] == [9 * 2**24, 9 * 2**25, 9 * 2**26]
    assert study.fewest_of_convolutions(images) == 2**29 and study.fewest_of_convolutions(images[1:]) in (2**29, 2**28)


@recorded_sweep
@pytest.mark.parametrize("scales", fp8.SCALES)
def test_the_engine_takes_the_layers_that_gain_in_the_recorded_sweep(scales):
    rows = results.read_json(RECORDED / "fp8-shapes.json")["metrics"]["shapes"]
    taken = [row for row in rows if row["before"] and fp8.pays(row["rows"], row["inputs"], row["outputs"], scales)]
    assert taken, "there is something to gain"
    assert fp8.FEWEST[scales] == study.fewest(rows, scales)
    spent = lambda rows, way: sum(study.whole(row, way) for row in rows)
    best = sum(min(study.whole(row, way) for way in ("bf16", scales)) for row in rows if row["before"])
    ours = spent(taken, scales) + spent([row for row in rows if row["before"] and row not in taken], "bf16")
    assert ours < 1.02 * best, "a rule in one number loses little against choosing layer by layer"
    assert spent(taken, scales) < 0.9 * spent(taken, "bf16")
    assert spent(taken, "tensor") < spent(taken, "row"), "what `prepare` says of its scales"


@recorded_sweep
def test_the_engine_takes_the_convolutions_that_gain_in_the_recorded_sweep():
    metrics = results.read_json(RECORDED / "fp8-shapes.json")["metrics"]
    rows = metrics["convolutions"]
    assert fp8.FEWEST_OF_CONVOLUTION == study.fewest_of_convolutions(rows)
    for row in rows:  # the engine's own count
        with torch.device("meta"):
            conv = torch.nn.Conv2d(row["inputs"], row["outputs"], 3)
        row["taken"] = fp8.Convolution(conv, None, fp8.Rounding("row", "measured")).pays(row["samples"] * row["lines"] ** 2)
        assert row["taken"] == (study.multiplications(row) >= fp8.FEWEST_OF_CONVOLUTION)
    taken = [row["seconds"] for row in rows if row["taken"]]
    best = sum(min(row["seconds"].values()) for row in rows)
    ours = sum(row["seconds"]["e4m3" if row["taken"] else "bf16"] for row in rows)
    assert ours < 1.02 * best, "a rule in one number loses little against choosing one by one"
    assert sum(seconds["e4m3"] for seconds in taken) < 0.9 * sum(seconds["bf16"] for seconds in taken)


@recorded_sweep
def test_gating_in_the_same_kernel_gains_where_the_engine_does_it_in_the_recorded_sweep():
    rows = results.read_json(RECORDED / "fp8-shapes.json")["metrics"]["shapes"]
    second = {(row["rows"], row["outputs"]): row for row in rows if row["layer"] == "feed-forward 2"}
    first = [row for row in rows if row["layer"] == study.GATED and row["rows"] >= linear_geglu.ENOUGH]
    taken = [(row, second[row["rows"], row["inputs"]]) for row in first]
    taken = [pair for pair in taken if all(fp8.pays(row["rows"], row["inputs"], row["outputs"]) for row in pair)]
    assert len(taken) > 4, "SDXL's and the largest of SD 1.5's"
    apart = sum(wide["seconds"]["row"] + narrow["seconds"]["before_tensor"] for wide, narrow in taken)
    assert sum(wide["seconds"]["gated_row"] for wide, _ in taken) < apart


@recorded_sweep
def test_a_layer_without_a_kernel_before_it_would_not_gain_in_the_recorded_sweep():
    rows = results.read_json(RECORDED / "fp8-shapes.json")["metrics"]["shapes"]
    outputs = [row for row in rows if not row["before"]]
    gained = sum(max(0.0, study.whole(row, "bf16") - study.whole(row, "row")) for row in outputs)
    assert gained < 0.02 * sum(study.whole(row, "bf16") for row in rows), "a pass of its own is worth it after all"


def small_task():
    return Task(16, 16, 2, 4.0, (("a red sphere",),), ((0,),))


def test_errors_by_layer_and_by_call(rounding, monkeypatch):  # noqa: F811
    """The tiny UNet's layers, in bfloat16 from the start: exact is what float32 makes of the same weights."""
    monkeypatch.setattr(to_float8, "to_float8", by_reference)
    rounding.to(torch.float32)
    calls = study.recorded(rounding, small_task(), steps=3)
    assert len(calls) == 3 and all(output.dtype is torch.float32 for _, output in calls)
    rounding.to(torch.bfloat16)
    rows = study.layer_errors(rounding.unet, calls[1])
    blocks = sum(type(part) is BasicTransformerBlock for part in rounding.unet.modules())
    names = [row["layer"].rpartition(".")[2] for row in rows]
    assert len(rows) == 6 * blocks + CONVOLUTIONS and names.count("to_q") == 2 * blocks and "conv2" in names
    for row in rows:
        off = row["off"]
        if ".conv" in row["layer"]:
            assert set(off) == {"bf16", "row", "tensor"} and off["row"] == off["tensor"], "an image has one scale"
            assert off["bf16"] < 2**-7 and 2 * off["bf16"] < off["row"] < 2**-4 * (2 / 3) ** 0.5
            continue
        bounded = row["layer"].endswith(("ff.net.2", "attn2.to_q", "attn1.to_out.0"))  # by one scale, which an outlier would be beyond
        far = set() if bounded else {"row_outlier"} | ({"tensor_outlier"} if row["layer"].endswith("to_out.0") else set())
        assert set(off) == {"bf16", "row", "tensor", "bf16_outlier"} | far, "the bound of an output is what comes in"
        assert off["bf16"] < 2**-7 and off["bf16_outlier"] < 2**-7
        for way in off.keys() - {"bf16", "bf16_outlier"}:
            assert 2 * off["bf16"] < off[way] < 2**-4 * (2 / 3) ** 0.5, "half a step of each factor"
    found = study.call_errors(rounding, calls)
    assert set(found) == set(study.WAYS) and not engine.is_prepared(rounding)
    for way, off in found.items():
        assert 0 < off["median"] <= off["max"] < 0.2
        assert (off["median"] > 1.2 * found["eager_bf16"]["median"]) == way.startswith("engine_fp8")


@pytest.mark.gpu
def test_gpu_errors_of_pocket():
    """Each layer within what three bits cost it, and a picture no further from fp32's than can be seen."""
    found = study.errors("cuda", (("pocket", "shipped"),), pictures=16)
    for row in found["layers"]:
        assert max(row["off"].get(way, 0) for way in ("row", "tensor", "row_outlier")) < 2**-4 * (2 / 3) ** 0.5, row
    calls = found["calls"][0]
    assert calls["engine_bf16"]["median"] < 1.1 * calls["eager_bf16"]["median"]
    assert calls["engine_bf16"]["median"] < calls["engine_fp8_row"]["median"] < 2**-3
    decibels = {row["way"]: row["psnr_db"]["value"] for row in found["pictures"]}
    assert decibels["engine_bf16"] > decibels["engine_fp8_row"] > 20


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_a_shape_is_timed():
    for row in study.shapes("cuda", sizes=((2048, 1280),), rounds=3):
        assert min(row["seconds"].values()) > 0
        if row["layer"] == "feed-forward 1":
            assert study.whole(row, "row") < study.whole(row, "bf16"), "SDXL's largest product gains"


def test_without_fp8_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "environment", lambda device: {})
    monkeypatch.setattr(quantization, "has_fp8", lambda device: False)
    assert lessons.main(["fp8-shapes", "--out", str(tmp_path)]) == 2
    assert "8.9 or later" in capsys.readouterr().err and not list(tmp_path.iterdir())
    torch.set_grad_enabled(True)
