"""Pictures a second by batch: measured on a CPU with pocket, two steps; and what is made of recorded numbers."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from made_up import row as made_up_row

from sdopt import models, quantization, ratefigures, report, results, tables
from sdopt.bench import studies, throughput
from sdopt.bench.row import Recipe


def test_the_study_is_mlperfs_work_at_every_batch(monkeypatch):
    study = studies.study("sdxl-throughput")
    own = {key: getattr(study, key) for key in ("weights", "steps", "runs", "guidance_scale")}
    shared = studies.settings(study.model, **own)
    work = {"steps": 20, "guidance_scale": 8.0, "scheduler": "euler", "height": 1024, "width": 1024, "weights": "random"}
    assert work.items() <= shared.items()
    monkeypatch.setattr(quantization, "has_fp8", lambda device: True)
    rows = studies.rows_of(study, "cuda", study.steps)
    ids = [f"{kind}_batch_{n}" for kind in ("bf16", "fp8") for n in (1, 2, 4, 8, 16, 32, 64)]
    assert [row.id for row in rows] == ids and [row.settings["batch"] for row in rows] == [1, 2, 4, 8, 16, 32, 64] * 2
    asked = []
    monkeypatch.setattr("sdopt.engine.prepare", lambda pipe, **settings: asked.append(settings) or pipe)
    pipe = SimpleNamespace(vae=SimpleNamespace(enable_slicing=lambda: asked.append("one by one")))
    for row in rows[6:8]:
        row.apply(pipe)
    assert asked == ["one by one", {}, "one by one", {"precision": "fp8"}]
    monkeypatch.setattr(quantization, "has_fp8", lambda device: False)
    assert [row.id for row in studies.rows_of(study, "cuda", 20)] == ids[:7]


class Here:
    """In place of a process a row: all in this one."""

    def __init__(self, ctx, ahead):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, *arguments, on_phase, limit_s):
        return function({}, on_phase, *arguments)


def test_rows_have_rates_and_a_row_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput.process, "Fresh", Here)
    shared = studies.settings("pocket", height=64, width=64, steps=2, runs=2, guidance_scale=8.0)
    rows = [Recipe(f"bf16_batch_{n}", f"bf16, {n} at once", ("bf16", "sdpa"), settings={"batch": n}) for n in (1, 3)]
    rows.append(Recipe("bf16_batch_2", "bf16, of no such format", ("bf16",), {"dtype": torch.float64}, settings={"batch": 2}))
    result = throughput.by_batch(shared, rows, "cpu", tmp_path, study="pocket-throughput")
    one, three, none = results.read(tmp_path / "pocket-throughput.json")["rows"]
    for row, batch in ((one, 1), (three, 3)):
        rate, median = row["rate"], row["latency_s"]["median"]
        assert row["settings"]["batch"] == batch
        assert rate["images_per_s"] == pytest.approx(batch / median) and len(row["latency_s"]["runs"]) == 2
        assert rate["tflops"] == pytest.approx(rate["images_per_s"] * row["flops_a_picture"] / 1e12)
        assert list(row["ceiling_tflops"]) == ["bfloat16"]
        assert row["stages_ms"]["unet_calls"] == 2 and row["as_run"]["fp8_layers"] == 0
    assert one["flops_a_picture"] == three["flops_a_picture"] > 0
    assert none["status"].startswith("failed: ") and "rate" not in none
    text = tables.text(result)
    assert "images/s" in text and "failed: " in text and "batch 1 to 3" in text and "of fp8's" not in text
    assert throughput.by_batch(shared, rows, "cpu", tmp_path, study="pocket-throughput")["rows"] == result["rows"], "all done"
    rate, memory, clock = panels(tmp_path / "pocket-throughput.json", tmp_path, monkeypatch)
    timed = [(batch, batch / s) for row, batch in ((one, 1), (three, 3)) for s in row["latency_s"]["runs"]]
    assert [point for line in rate.lines[:2] for point in line.get_xydata().tolist()] == [pytest.approx(at) for at in timed]
    assert [line.get_xydata().tolist() for line in rate.lines if line.get_marker() == "x"] == [[[2, 0]]], "what failed"
    assert len(memory.lines[0].get_xdata()) == 2 and not len(clock.lines[0].get_xdata()), "a CPU's clock is not read"


def panels(file, tmp_path, monkeypatch):
    """The panels of the figure of `file`."""
    seen = []
    monkeypatch.setattr(ratefigures.figures, "save", lambda figure, *_: seen.append(figure))
    ratefigures.throughput_figure(file, tmp_path / "figure.png")
    return seen[0].axes


def test_the_recorded_figure_shows_every_call_and_the_ceilings(tmp_path, monkeypatch):
    file = report.ROOT / "figures" / "data" / "nvidia-h200" / "sdxl-throughput.json"
    rows = {row["id"]: row for row in results.read(file)["rows"]}
    rate, memory, clock = panels(file, tmp_path, monkeypatch)
    points = sum(len(line.get_xdata()) for line in rate.lines if line.get_linestyle() == "None")
    assert points == sum(len(row["latency_s"]["runs"]) for row in rows.values())
    ceilings = [line.get_ydata()[0] for line in rate.lines if line.get_linestyle() == "--"]
    flops = rows["fp8_batch_1"]["flops_a_picture"]
    for found, name in zip(ceilings, ("bfloat16", "fp8"), strict=True):
        each = [row["ceiling_tflops"][name] * 1e12 / flops for i, row in rows.items() if i.startswith(name[:1])]
        assert min(each) <= found <= max(each), name
    ghz = lambda row: row["gpu"]["sm_clock_mhz"]["median"] / 1000
    for axes, of in ((memory, lambda row: row["peak_memory_bytes"] / 2**30), (clock, ghz)):
        drawn = [y for line in axes.lines for y in line.get_ydata()]
        assert drawn == pytest.approx([of(row) for row in rows.values()])
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(drawn)


def test_operations_are_counted_from_shapes():
    """SDXL's, as they were counted before in another way: 6.76 trillion a sample of the UNet, 10.47 to decode a picture."""
    read = lambda part: json.loads((models.CONFIGS / "sdxl" / f"{part}.json").read_text())
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(read("unet")), AutoencoderKL.from_config(read("vae"))
    pipe = SimpleNamespace(unet=unet, vae=vae, vae_scale_factor=8, tokenizer=SimpleNamespace(model_max_length=77))
    counted = throughput.flops(pipe, SimpleNamespace(height=1024, width=1024, steps=3))
    assert counted == pytest.approx((3 * 2 * 6.761 + 10.470) * 1e12, rel=1e-3)


def test_the_table_says_that_it_is_not_mlperfs():
    ceiling = {"bfloat16": 700.0, "fp8": 1300.0}
    row = made_up_row("fp8_batch_8", 4.0, ceiling_tflops=ceiling, flops_a_picture=280e12, settings={"batch": 8})
    row["rate"] = throughput.rate(row, 8)
    shared = studies.settings("sdxl", "random", steps=20)
    environment = dict.fromkeys(results.ENVIRONMENT) | {"gpu": "NVIDIA H200", "cpu": "Some CPU, 2 cores"}
    others = [row | {"id": f"fp8_batch_{n}", "ceiling_tflops": {"bfloat16": n, "fp8": 2 * n}} for n in (600.0, 800.0)]
    result = {"schema": 1, "study": "sdxl-throughput", "environment": environment, "settings": shared, "rows": [row, *others]}
    said = tables.markdown(result)
    assert "random weights" in said and "not an MLPerf result" in said
    assert "| 2.00 |" in said and said.count("| 560 | 80% | 43% |") == 3, "shares are of the ceilings' medians"
    assert "bfloat16 600 to 800 TFLOP/s, fp8 1,200 to 1,600 TFLOP/s" in said
    assert report.MEASURED["throughput"]
