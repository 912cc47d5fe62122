import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import row as made_up_row
from made_up import killed
from tiny import draw, unet_batches

from sdopt import drawing, engine, models, path, quantization, results, timing
from sdopt.bench import gallery, grids, process, sharing, studies
from sdopt.cli import main

CPU = process.context("cpu")
SHARED = studies.settings("pocket", runs=9, height=64, width=64, steps=2)
ROWS = [row for row in grids.batches("cpu", 2) if row.batch in (1, 2, 8)]
ORDER = [row.id for row in ROWS]


@pytest.fixture
def no_int8(monkeypatch):
    """As on an H200, where int8 rounds nothing."""
    monkeypatch.setattr(quantization, "gains_nowhere", lambda device: True)


def by_id(rows):
    return {row.id: row for row in rows}


def test_batches_are_every_way_at_every_batch_and_large_ones_have_fewer_runs():
    rows = studies.rows_of(studies.study("sd15-batches"), "cuda", 35)
    assert [row.id for row in rows] == [f"{w}_{b}" for w in ("eager", "compiled", "engine") for b in (1, 2, 4, 8, 16, 24)]
    assert {row.steps for row in rows} == {("bf16", "sdpa")} and [row.compiles for row in rows].count(True) == 6
    assert [row.runs(9) for row in rows[:6]] == [9, 9, 9, 3, 3, 3] and [rows[3].runs(n) for n in (1, 2, 5, 30)] == [1, 2, 3, 10]
    assert rows[0].differs(SHARED) == {} and rows[3].differs(SHARED) == {"batch": 8, "runs": 3}
    assert studies.study("sd15-batches").steps == 35, "x-stable-diffusion's"


def test_the_hpml_rows_are_the_projects_in_its_order():
    rows = studies.rows_of(studies.study("sd15-hpml"), "cuda", 30)
    how = [(row.pipeline, row.scheduler, row.num_steps or 30, row.stop) for row in rows]
    assert how == [
        ("eager", None, 30, 1.0),
        ("compiled", None, 30, 1.0),
        ("tiny", None, 30, 1.0),
        ("compiled", None, 30, 1.0),
        ("compiled", None, 20, 1.0),
        ("compiled", "dpm", 20, 1.0),
        ("compiled", "dpm", 20, 0.4),
        ("compiled", None, 20, 0.4),
        ("tiny", "dpm", 20, 0.4),
    ]
    assert {row.options["dtype"] for row in rows} == {torch.float16}
    assert models.MODELS["sd15"].scheduler == "euler_ancestral"


def test_the_final_configuration_draws_what_its_parts_draw(pocket, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: asked.append((module, settings)))
    final = by_id(grids.hpml("cpu", 4))["final"]
    job = SimpleNamespace(recipe=final, model="pocket", weights="shipped", device="cpu", cache=None, artifacts=None)
    state = {}
    gallery.begin(state, lambda phase: None, job)
    pipe = state["pipe"]
    assert [module for module, _ in asked] == [pipe.unet, pipe.vae.decoder]
    assert asked[0][1]["options"]["max_autotune"] and pipe.unet.dtype is torch.float16
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    call = gallery.sampling(pipe, state["scheduler"], final)
    with unet_batches(pipe) as batches:
        drawn = draw(pipe, **call)
    assert batches == [2, 2, 1, 1]
    wanted, call = path.prepare(pocket, ["bf16", "sdpa", "tiny_vae", "dpm_20", "cfg_cutoff"], dtype=torch.float16, steps=4)
    assert abs(draw(wanted, **call) - drawn).mean() < 0.01


def test_each_step_is_there_in_its_place_and_left_out(no_int8):
    rows = by_id(grids.attribution("cuda", 30))
    assert list(rows) == [
        *("baseline_fp32", "bf16", "sdpa", "compile", "fused_qkv", "tiny_vae", "dpm_20", "cfg_cutoff"),
        *("without_bf16", "without_sdpa", "without_compile", "without_fused_qkv", "without_tiny_vae", "without_dpm_20"),
    ]
    place = {step: i for i, row in rows.items() for step in row.told["upto"]}
    assert list(place) == list(path.NUMBERS) and place["int8"] == "fused_qkv", "the pipeline is the same"
    without = {step: (i, other) for i, row in rows.items() for step, other in row.told["without"].items()}
    assert set(without) == set(path.NUMBERS) - {"baseline_fp32"}
    assert without["cfg_cutoff"] == ("dpm_20", "cfg_cutoff") and without["int8"] == ("cfg_cutoff", "cfg_cutoff")
    for step, (i, other) in without.items():
        if step != "int8":
            assert set(rows[other].told["steps"]) - set(rows[i].told["steps"]) == {step}, "one step apart"
    for i, row in rows.items():
        drawn = Counter({"scheduler": row.scheduler, "stop": row.stop})
        assert (drawn["scheduler"] == "dpm") == ("dpm_20" in row.told["steps"])
        assert (drawn["stop"] < 1) == ("cfg_cutoff" in row.told["steps"])
        assert set(row.steps) == set(row.told["steps"]) - {"dpm_20", "cfg_cutoff"}, i


def test_rows_of_the_same_modules_share_a_process_and_none_is_measured_twice(no_int8):
    rows = grids.attribution("cuda", 30)
    assert len({tuple(row.told["steps"]) for row in rows}) == len(rows) == 14
    shared = Counter(row.pipeline for row in rows)
    assert sorted(shared.values()) == [1] * 8 + [2, 4]
    assert {row.id for row in rows if shared[row.pipeline] == 4} == {"tiny_vae", "dpm_20", "cfg_cutoff", "without_dpm_20"}
    assert {row.id for row in rows if shared[row.pipeline] == 2} == {"fused_qkv", "without_tiny_vae"}


def test_where_int8_rounds_it_is_a_row_in_both_places():
    rows = by_id(grids.attribution("cpu", 30))
    assert "int8" in rows and rows["without_int8"].told["without"] == {"int8": "cfg_cutoff"} and len(rows) == 16
    assert all(row.told["steps"].count("int8") == ("int8" in row.steps) for row in rows.values())


def test_what_a_study_may_take_follows_from_a_recorded_path(no_int8):
    recorded = {"settings": studies.settings("sdxl", "random"), "rows": []}
    for i, seconds, first in (("sdpa", 2.0, 5.0), ("compile", 1.0, 100.0), ("cfg_cutoff", 0.5, 80.0)):
        recorded["rows"].append(made_up_row(i, seconds, first_call_s=first))
    recorded["rows"][2]["settings"] = {"steps": 20, "cutoff": 0.4}
    shared = studies.settings("sdxl", "random", runs=9)
    took = grids.reckon(grids.batches("cuda", 30), recorded, shared)
    assert took["engine_1"] == pytest.approx(15 + 13.2), "stages are told by three calls"
    assert took["eager_1"] == pytest.approx(15 + 10.2 * 2), "and calls of two seconds tell their own"
    assert took["eager_8"] == pytest.approx(4.2 * 16)
    assert took["compiled_2"] == pytest.approx(100 + 10.2 * 2) and took["engine_16"] == pytest.approx(4.2 * 16)
    took = grids.reckon(grids.attribution("cuda", 30), recorded, shared)
    assert "baseline_fp32" not in took and took["cfg_cutoff"] == pytest.approx(15 + 13.2 * 0.5 + 20)
    assert took["without_compile"] == pytest.approx(15 + 13.2 * 2.0 * 28 / 60), "28 samples instead of 60"
    assert grids.reckon(grids.batches("cuda", 30), None, shared) == {}
    assert grids.reckon(grids.batches("cuda", 30), recorded, shared | {"height": 512}) == {}


def noted(job, what):
    with open(job.cache.parent / "log.txt", "a") as log:
        log.write(what + "\n")


def begin(state, tell, job):
    noted(job, f"loaded {job.recipe.pipeline}")
    if job.recipe.pipeline == "engine":
        raise process.RowFailed("the engine needs a CUDA GPU")
    return 1.5


def measure(state, tell, job):
    noted(job, job.recipe.id)
    assert {len(each) for each in (*job.prompts, *job.seeds)} == {job.recipe.batch or 1}
    if job.recipe.id == "compiled_2":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB")
    numbers = made_up_row(job.recipe.id, 1.0)
    kept = ("latency_s", "first_call_s", "peak_memory_bytes", "stages_ms", "as_run")
    return ({key: numbers[key] for key in kept} | {"took_s": {"timing": float(len(job.prompts))}},)


def study(out, rows=ROWS, **more):
    """A study over made-up measurements, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "begin", begin)
        patch.setattr(sharing, "measure", measure)
        patch.setattr("sdopt.results._commit", lambda: None)
        return sharing.share(SHARED, rows, "cpu", out, every=rows, study="pocket-batches", **more)


def log(out):
    return (out / "log.txt").read_text().split("\n")


def test_a_study_that_is_killed_goes_on_and_measures_no_finished_row_again(tmp_path):
    killed(study, 3, tmp_path)
    made = study(tmp_path)
    assert [row["id"] for row in made["rows"]] == ORDER and results.read(tmp_path / "pocket-batches.json") == made
    assert [log(tmp_path).count(i) for i in ORDER] == [1, 1, 2, 1, 1, 1, 0, 0, 0], "a kill costs the row that was under way"
    again = log(tmp_path)
    assert study(tmp_path) == made and log(tmp_path) == again, "nothing is left to do"


def test_what_does_not_fit_is_a_row_with_its_reason_and_the_next_goes_on_in_a_new_process(tmp_path):
    rows = {row["id"]: row for row in study(tmp_path)["rows"]}
    assert rows["compiled_2"]["status"] == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 24.00 GiB"
    assert rows["compiled_2"]["settings"] == {"batch": 2} and rows["compiled_2"]["way"] == "compiled"
    assert {rows[i]["status"] for i in ORDER if "engine" in i} == {"failed: the engine needs a CUDA GPU"}
    assert [line for line in log(tmp_path) if "loaded" in line] == ["loaded eager"] + ["loaded compiled"] * 2 + ["loaded engine"]
    assert rows["eager_1"]["took_s"] == {"load": 1.5, "timing": 9.0} and rows["eager_8"]["took_s"] == {"timing": 3.0}
    assert rows["compiled_8"]["took_s"] == {"load": 1.5, "timing": 3.0}
    assert studies.estimate(ROWS, {"settings": SHARED, "rows": list(rows.values())}, SHARED)["eager_8"] == 3.0
    study(tmp_path, retry=True)
    assert log(tmp_path).count("compiled_2") == 2 and log(tmp_path).count("compiled_8") == 1


def ahead(state, tell, jobs, asked=()):
    noted(jobs[0], "ahead " + "+".join(job.recipe.id for job in jobs))
    if jobs[0].recipe.id == "compiled_1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return {job.recipe.id: {"cold_s": 100.0, "compiled": 2, "found": 0} for job in jobs}


@pytest.mark.parametrize("cores", [8, 2])
def test_what_compiles_does_so_ahead_and_its_first_call_is_told_cold_and_warm(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(gallery, "compile_ahead", ahead)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    rows, told = [row for row in grids.batches("cpu", 2) if row.batch != 2], []
    made = study(tmp_path, rows, progress=lambda done, text: told.append(text))
    found = {row["id"]: row for row in made["rows"]}
    compiled = [i for i in found if i.startswith("compiled")]
    calls = {i: found[i].get("first_calls") for i in compiled}
    if cores == 2:
        assert set(calls.values()) == {None} and not any("ahead" in line for line in log(tmp_path))
        return
    assert told[0] == "compiling what 5 rows need, 3 processes side by side", "no more pictures at once than a GPU holds"
    assert sorted(line for line in log(tmp_path) if "ahead" in line) == sorted(f"ahead {i}" for i in compiled), "a process each"
    assert log(tmp_path).index("loaded eager") >= len(compiled), "before anything is timed"
    assert calls.pop("compiled_1") is None and found["compiled_1"]["status"] == "ok", "it compiled for itself"
    for i, first in calls.items():
        beside = {j for j in calls if j != i}
        assert set(first.pop("beside")) == beside
        assert first == {"cold_s": 100.0, "compiled": 2, "found": 0, "warm_s": 3.0}
        assert found[i]["first_call_s"] == 100.0
    assert not any("first_calls" in found[i] for i in found if i not in compiled)


def compiles_once_more(state, tell, jobs, asked=()):
    return {job.recipe.id: {"cold_s": 20.0, "compiled": 1, "found": 1} for job in jobs}


def stop(*_):
    raise KeyboardInterrupt


def test_a_first_call_is_not_forgotten_when_a_study_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "compile_ahead", ahead)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    rows = [row for row in grids.batches("cpu", 2) if row.id in ("eager_1", "compiled_4", "compiled_8")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharing, "together", stop)
        study(tmp_path, rows)
    monkeypatch.setattr(gallery, "compile_ahead", compiles_once_more)
    made = {row["id"]: row for row in study(tmp_path, rows)["rows"]}
    assert {row["status"] for row in made.values()} == {"ok"}
    assert made["compiled_4"]["first_call_s"] == 100.0 and made["compiled_4"]["first_calls"]["warm_s"] == 3.0


def test_rows_of_a_pipeline_share_a_process_ahead_and_what_searches_is_not_there(tmp_path, monkeypatch, no_int8):
    monkeypatch.setattr(gallery, "compile_ahead", ahead)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    searching = by_id(grids.hpml("cpu", 2))
    study(tmp_path / "a", [searching["compiled"], searching["compiled_tiny"]])
    assert not any("ahead" in line for line in log(tmp_path / "a")), "it would time kernels beside others"
    rows = by_id(grids.attribution("cuda", 2))
    study(tmp_path / "b", [rows[i] for i in ("fused_qkv", "tiny_vae", "dpm_20", "without_compile", "without_tiny_vae")])
    compiled = {line for line in log(tmp_path / "b") if "ahead" in line}
    assert compiled == {"ahead tiny_vae+dpm_20", "ahead fused_qkv+without_tiny_vae"}


def test_rows_of_a_pipeline_are_measured_together_and_told_in_the_studys_order(tmp_path):
    rows = grids.hpml("cpu", 2)
    made = study(tmp_path, rows)
    assert [row["id"] for row in made["rows"]] == [row.id for row in rows]
    assert [line.removeprefix("loaded ") for line in log(tmp_path) if "loaded" in line] == ["eager", "compiled", "tiny"]
    assert log(tmp_path).index("euler_20_cutoff") < log(tmp_path).index("compiled_tiny")


def test_a_batch_finds_no_graphs_of_the_one_before(fresh_compiler):
    layer, backend = Double(), Counting()
    layer.compile(backend=backend, dynamic=False)
    pipe = SimpleNamespace(unet=layer, vae=torch.nn.Linear(2, 2))
    for _ in range(2):
        layer(torch.ones(1, 2))
    assert backend.graphs == 1
    sharing.renew(pipe, ROWS[3])
    layer(torch.ones(1, 2))
    assert backend.graphs == 2


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


class Counting:
    graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.gpu
def test_on_a_gpu_a_long_call_tells_its_own_stages(monkeypatch):
    monkeypatch.setattr(drawing, "LONG_S", 0.0)
    pipe = models.load("pocket", device="cuda")
    task = drawing.Task(64, 64, 4, 3.0, (("a red sphere",),) * 2, ((0,), (1,)))
    with unet_batches(pipe) as batches:
        numbers, _ = drawing.measure(pipe, task, settling=gallery.SETTLING)
    assert batches == [2] * (4 + 2 + 2 * 4) and numbers["stages_ms"]["unet_calls"] == 4
    assert sum(numbers["stages_ms"][stage] for stage in ("text_encoder", "unet", "scheduler", "vae")) > 0


@pytest.mark.gpu
def test_on_a_gpu_calls_that_settle_are_short_and_the_engine_captures_each_batch_anew():
    pipe, _ = path.prepare(models.load("pocket", device="cuda"), ("bf16", "sdpa"))
    recipe = by_id(grids.batches("cuda", 4))["engine_1"]
    recipe.apply(pipe)
    for batch in (1, 2):
        task = drawing.Task(64, 64, 4, 3.0, (("a red sphere",) * batch,), (tuple(range(batch)),))
        with unet_batches(pipe) as batches:
            drawing.measure(pipe, task, settling=gallery.SETTLING)
        calls = 4 + 2 + 4 + 4 * timing.STAGE_CALLS  # the first one, one of two steps to settle, the timed one, the stages
        assert batches == [2 * batch] * calls
        assert len(pipe.unet.forward.entries) == 1
        sharing.renew(pipe, recipe)
        assert engine.is_prepared(pipe) and not pipe.unet.forward.entries


def test_a_real_study_of_batches_on_a_cpu(tmp_path, capsys):
    asked = ["bench", "pocket-batches", "--device", "cpu", "--out", str(tmp_path), "--runs", "2", "--steps", "1"]
    asked += ["--height", "64", "--width", "64", "--only", "eager_1,eager_2,engine_1"]
    assert main(asked) == 1, "no engine on a CPU"
    rows = {row["id"]: row for row in results.read(tmp_path / "pocket-batches.json")["rows"]}
    assert list(rows) == ["eager_1", "eager_2", "engine_1"] and rows["engine_1"]["status"].startswith("failed: the engine needs")
    assert rows["eager_1"]["stages_ms"]["unet_calls"] == 1 and len(rows["eager_2"]["latency_s"]["runs"]) == 2
    assert "load" in rows["eager_1"]["took_s"] and rows["eager_2"]["warm_from"] == "eager_1"
    assert rows["eager_2"]["settings"] == {"batch": 2} and rows["eager_2"]["quality"] is None
    assert "batch 1 to 2" in capsys.readouterr().out


def test_a_real_study_of_what_steps_are_worth_on_a_cpu(tmp_path, capsys):
    asked = ["bench", "pocket-attribution", "--device", "cpu", "--out", str(tmp_path), "--runs", "1", "--steps", "2"]
    asked += ["--height", "64", "--width", "64", "--only", "sdpa,bf16"]
    assert main(asked) == 0
    rows = results.read(tmp_path / "pocket-attribution.json")["rows"]
    assert [(row["id"], row["upto"], row["as_run"]["unet_dtype"]) for row in rows] == [
        ("bf16", {"bf16": "baseline_fp32"}, "bfloat16"),
        ("sdpa", {"sdpa": "bf16"}, "bfloat16"),
    ]
    assert main([*asked, "--dry-run"]) == 0
    assert "all 2 rows are done" in capsys.readouterr().out


def test_pictures_of_a_leave_one_out_are_those_of_its_steps(pocket):
    """Rows share pipelines, so that the last two steps are not applied by `path.prepare`."""
    row = by_id(grids.attribution("cpu", 5))["without_compile"]
    kept = [i for i in row.told["steps"] if i != "int8"]
    wanted, call = path.prepare(pocket, kept, steps=5)
    task = drawing.Task(64, 64, 5, 3.0, (("a red sphere",),), ((0,),))
    drawn = drawing.drawer(wanted, task, **call)(0, "np")
    shared, _ = path.prepare(models.load("pocket"), [i for i in row.steps if i != "int8"])
    shared.set_progress_bar_config(disable=True)
    call = gallery.sampling(shared, shared.scheduler, row)
    np.testing.assert_array_equal(drawing.drawer(shared, task, **call)(0, "np"), drawn)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pocket-batches", "--batch", "2"], "--batch is not for pocket-batches, whose rows are batches"),
        (["sd15-hpml", "--only", "fp8"], "unknown row 'fp8': choose from baseline, compiled, compiled_tiny"),
        (["pocket-attribution", "--pictures", "4"], "--pictures is for quality studies"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, argv, said):
    assert main(["bench", *argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
