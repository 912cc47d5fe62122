"""The study of stages: its rows, its process, killed and taken up again."""

from dataclasses import replace

import pytest
import torch
from made_up import killed, stages_result
from tiny import computes_wide

from sdopt import engine, results, roofline
from sdopt.bench import process, stages, studies, walk
from sdopt.bench.judge import Judge
from sdopt.bench.row import Recipe
from sdopt.compilation import compile_pipeline

SHARED = studies.settings("pocket", runs=2, steps=2, height=64, width=64)
ROWS = studies.nine(2)[:4]
NUMBERS = ("latency_s", "first_call_s", "peak_memory_bytes", "stages_ms", "as_run", "roofline")


def test_the_study_has_the_nine_steps_and_on_a_gpu_the_engine():
    study = studies.study("sdxl-stages")
    nine = [row.id for row in studies.nine(30)]
    assert [row.id for row in studies.rows_of(study, "cpu", 30)] == nine
    assert [row.id for row in studies.rows_of(study, "cuda", 30)] == [*nine, "engine_bf16", "whole_path_engine"]


def test_a_row_is_counted_and_predicted_before_it_is_timed(monkeypatch):
    """A real one, small: of pocket's sdpa, in this process."""
    told, small = [], lambda device, formats: roofline.Ceilings(dict.fromkeys(formats, 1e11), 1e10, 1e-6)
    monkeypatch.setattr(stages.roofline, "ceilings", small)
    row = stages.measure({}, told.append, walk.job_of(ROWS[2], SHARED, Judge(SHARED), "cpu"))
    assert told.index("counting its operators") < told.index("ceilings") < told.index("first call") < told.index("stages")
    about = row["roofline"]
    assert set(about["stages"]) == {"text_encoder", "unet", "scheduler", "vae"}
    assert sum(row["stages_ms"][stage] for stage in about["stages"]) <= about["call_ms"], "a part is no more than the whole"
    assert row["stages_ms"]["unet_calls"] == 2 and len(row["latency_s"]["runs"]) == 2
    for stage, counted in about["stages"].items():
        assert counted["way"] == "eager" and counted["predicted_ms"] > 0 and counted["bytes"] > 0
        assert sum(kind["flops"] for kind in counted["kinds"].values()) == sum(counted["flops"].values())
        layers = "float32" if computes_wide() else "bfloat16"  # attention stays in its own
        assert counted["flops"].keys() <= {layers, "bfloat16"} and (layers in counted["flops"]) == (stage != "scheduler")
        at_least = max(sum(counted["flops"].values()) / 1e11, counted["operators"] * 1e-6)
        assert counted["predicted_ms"] >= 1e3 * at_least * 0.999


def test_what_runs_compiled_or_on_the_engine_is_predicted_fused(pocket, monkeypatch):
    eager = {"text_encoder": "eager", "unet": "eager", "scheduler": "eager", "vae": "eager"}
    assert stages.ways(pocket) == eager
    compile_pipeline(pocket, backend="eager")  # on a CPU the UNet's blocks alone
    assert stages.ways(pocket) == eager | {"unet": "fused"}
    pocket.vae.decoder.compile(backend="eager")
    assert stages.ways(pocket)["vae"] == "fused"
    monkeypatch.setattr(engine, "is_prepared", lambda pipe: True)
    assert stages.ways(pocket) == {"text_encoder": "graph", "unet": "fused", "scheduler": "eager", "vae": "fused"}


def measure(state, tell, job):
    with open(job.cache.parent / "log.txt", "a") as log:
        log.write(job.recipe.id + "\n")
    if job.recipe.id == "sdpa":
        raise MemoryError("CUDA out of memory")
    made = stages_result()["rows"][len(job.recipe.steps) - 1]
    return {key: made[key] for key in NUMBERS} | {
        "drawn_with": {"steps": 2, "guidance_scale": 3.0, "scheduler": "euler"}
    }


class Here(process.Fresh):
    """Calls in this process: what is killed here is the study, not one of its rows."""

    def call(self, function, *arguments, on_phase, limit_s):
        kind, value = process._answer(function, {}, on_phase, arguments)
        if kind == "done":
            return value
        raise process.RowFailed(value)


def study(out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "Fresh", Here)
        patch.setattr(stages, "measure", measure)
        patch.setattr("sdopt.results._commit", lambda: None)
        return stages.look(SHARED, ROWS, "cpu", out)


def test_a_study_that_is_killed_goes_on_and_measures_no_finished_row_again(tmp_path):
    for writes in (2, 2):
        killed(study, writes, tmp_path)
    result = study(tmp_path)
    assert results.read(tmp_path / "pocket-stages.json") == result
    assert [row["status"] for row in result["rows"]] == ["ok", "ok", "failed: MemoryError: CUDA out of memory", "ok"]
    log = (tmp_path / "log.txt").read_text().split()
    assert [log.count(row.id) for row in ROWS] == [1, 2, 2, 1], "a kill costs the row that was about to be written"
    assert study(tmp_path) == result and (tmp_path / "log.txt").read_text().split() == log


def test_what_compiles_is_counted_without_its_compiler(monkeypatch):
    applied, counted = [], []
    monkeypatch.setattr(stages, "load", lambda job, tell: torch.nn.Identity())
    monkeypatch.setattr(stages, "apply", lambda pipe, recipe: (applied.append(recipe), (pipe, {}))[1])
    monkeypatch.setattr(stages.drawing, "drawer", lambda *_, **__: counted.append(len(applied)))
    monkeypatch.setattr(stages.roofline, "count_stages", lambda pipe, draw: 1 / 0)
    recipe = Recipe("x", "x", ("bf16", "sdpa", "compile"), apply=print)
    job = replace(walk.job_of(ROWS[0], SHARED, Judge(SHARED), "cpu"), recipe=recipe)
    with pytest.raises(ZeroDivisionError):
        stages.measure({}, lambda phase: None, job)
    assert counted == [1] and applied[0].steps == ("bf16", "sdpa") and applied[0].apply is None
