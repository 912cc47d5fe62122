import os

import numpy as np
import pytest
import torch
from made_up import row as made_up_row
from made_up import killed
from tiny import unet_batches

from sdopt import drawing, models, path, quantization, records, results
from sdopt.bench import gallery, process, sharing, studies, survey, sweeps
from sdopt.bench.row import Recipe
from sdopt.cli import main
from sdopt.pocket import captions

CPU = process.context("cpu")
SHARED = studies.settings("pocket", runs=1, height=64, width=64, steps=2, pictures=5)
ROWS = [row for row in sweeps.rows("cpu", 2) if row.id in ("baseline_fp32", "noise_seed", "bf16", "noise_bf16", "euler_4_steps", "cutoff_0")]
ORDER = [row.id for row in ROWS]
NUMBERS = ("latency_s", "first_call_s", "peak_memory_bytes", "stages_ms", "as_run")


def noted(shelf, what):
    shelf.folder.mkdir(parents=True, exist_ok=True)
    with open(shelf.folder / "log.txt", "a") as log:
        log.write(what + "\n")


def begin(state, tell, job):
    state["pipeline"] = job.recipe.pipeline
    if job.recipe.pipeline == "noise_bf16":
        raise process.RowFailed("no bf16 here")
    return 1.0


def measure(state, tell, job, asked, shelf):
    i = job.recipe.id
    assert state["pipeline"] == job.recipe.pipeline
    noted(shelf, i)
    tell(gallery.PICTURES)
    if i == "noise_seed":
        raise MemoryError("out of memory")
    if i == "baseline_fp32":
        shelf.put(shelf.pictures, np.zeros(1))
    made = made_up_row(i, 1.0)
    record = {"objects_right": [2] * 5, "objects_of": [2] * 5, "relations_right": [1] * 5, "relations_of": [1] * 5}
    return {key: made[key] for key in NUMBERS} | {"took_s": {"timing": 2.0, "pictures": 3.0}}, record, None


def study(out, rows=ROWS, **more):
    """A study over made-up measurements, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("begin", "measure"):
            patch.setattr(gallery, name, globals()[name])
        patch.setattr("sdopt.results._commit", lambda: None)
        return survey.survey(SHARED, rows, "cpu", out, every=ROWS, **more)


def log(out):
    (file,) = out.glob("pocket-quality/shelf-*/log.txt")
    return file.read_text().split()


def test_a_study_that_is_killed_goes_on_and_measures_no_finished_row_again(tmp_path):
    for writes in (1, 3):
        killed(study, writes, tmp_path)
    made = study(tmp_path)
    status = {row["id"]: row["status"] for row in made["rows"]}
    assert list(status) == ORDER and results.read(tmp_path / "pocket-quality.json") == made
    assert status.pop("noise_seed") == "failed: MemoryError: out of memory"
    assert status.pop("noise_bf16") == "failed: no bf16 here"
    assert set(status.values()) == {"ok"}
    counts = [log(tmp_path).count(i) for i in ORDER]
    assert counts == [2, 1, 2, 0, 1, 1], "a kill costs the row that was under way"
    assert study(tmp_path) == made and [log(tmp_path).count(i) for i in ORDER] == counts, "nothing is left to do"


def test_failed_rows_are_tried_again_when_asked_and_lost_records_are_drawn_again(tmp_path):
    study(tmp_path)
    study(tmp_path, retry=True)
    assert log(tmp_path).count("noise_seed") == 2 and log(tmp_path).count("bf16") == 1
    (tmp_path / "pocket-quality" / "euler_4_steps.json.xz").unlink()
    study(tmp_path)
    assert log(tmp_path).count("euler_4_steps") == 2 and log(tmp_path).count("bf16") == 1


def test_damaged_records_are_drawn_again_and_the_references_before_what_is_compared_with_it(tmp_path):
    study(tmp_path, [ROWS[0], ROWS[2]])
    for i in ("baseline_fp32", "bf16"):
        (tmp_path / "pocket-quality" / f"{i}.json.xz").write_text("junk")
    study(tmp_path, ROWS[4:5])
    assert log(tmp_path) == ["baseline_fp32", "bf16", "baseline_fp32", "euler_4_steps"]
    study(tmp_path, ROWS[2:3])
    assert log(tmp_path)[4:] == ["bf16"]


def test_the_reference_is_drawn_first_where_its_pictures_are_needed(tmp_path):
    made = study(tmp_path, ROWS[2:3])
    assert [row["id"] for row in made["rows"]] == ["baseline_fp32", "bf16"]
    for file in tmp_path.glob("pocket-quality/shelf-*/pictures.npy"):
        file.unlink()
    study(tmp_path, ROWS[4:5])
    assert log(tmp_path) == ["baseline_fp32", "bf16", "baseline_fp32", "euler_4_steps"]


COMPILED = [row for row in sweeps.rows("cpu", 2) if row.id in ("compile", "tiny_vae", "dpm_20")]


def compile_ahead(state, tell, jobs, asked):
    folder = jobs[0].cache.parent / "ahead"
    folder.mkdir(exist_ok=True)
    (folder / "-".join([*(job.recipe.id for job in jobs), str(len(asked))])).touch()
    if jobs[0].recipe.id == "compile":
        raise MemoryError("out of memory")
    return {}


AHEAD = {f"{rows}-{pictures}" for rows in ("compile", "tiny_vae-dpm_20") for pictures in (0, 5)}


@pytest.mark.parametrize(("cores", "ahead"), [(4, AHEAD), (2, set())])
def test_what_compiles_does_so_side_by_side_before_anything_is_timed(tmp_path, monkeypatch, cores, ahead):
    monkeypatch.setattr(gallery, "compile_ahead", compile_ahead)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    rows, told = [*ROWS, *COMPILED], []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("begin", "measure"):
            patch.setattr(gallery, name, globals()[name])
        made = survey.survey(SHARED, rows, "cpu", tmp_path, lambda done, text: told.append(text))
    status = {row["id"]: row["status"] for row in made["rows"]}
    assert {path.name for path in tmp_path.glob("ahead/*")} == ahead
    assert all(status[row.id] == "ok" for row in COMPILED), "one that failed ahead may still succeed"
    assert told[0].startswith("compiling what 3 rows need, 2 processes" if ahead else "baseline_fp32: ")


@pytest.mark.parametrize("pictures", [0, 3])
def test_ahead_of_its_rows_a_pipeline_meets_one_picture_or_many_on_both_sides_of_a_cutoff(pictures, monkeypatch):
    row = next(row for row in sweeps.rows("cpu", 2) if row.id == "cutoff_0.4")
    jobs, state = [sharing.own_job(row, SHARED, "cpu", None)], {}
    monkeypatch.setattr(gallery, "begin", lambda state, tell, job: state.update(shared_pipe()))
    graphs = iter([{"compiled": n, "found": 1} for n in (1, 3)])
    monkeypatch.setattr(gallery.compilation, "graphs_so_far", lambda: next(graphs))
    first = gallery.compile_ahead(state, lambda phase: None, jobs, captions.test_prompts(3)[:pictures])
    assert state["batches"] == ([6, 3] if pictures else [2, 1])
    assert first == {"cutoff_0.4": {"cold_s": first["cutoff_0.4"]["cold_s"], "compiled": 2, "found": 0}}
    assert first["cutoff_0.4"]["cold_s"] > 0


def shared_pipe():
    """The state that `gallery.begin` leaves, with the batches that the UNet sees."""
    pipe, batches = models.load("pocket"), []
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))
    return {"pipe": pipe, "scheduler": pipe.scheduler, "drawn": None, "batches": batches}


def test_rows_say_what_they_are_and_what_they_cost(tmp_path):
    rows = {row["id"]: row for row in study(tmp_path)["rows"]}
    assert rows["bf16"]["settings"] == {} and rows["bf16"]["family"] == "path" and rows["bf16"]["unet_samples"] == 4
    assert rows["euler_4_steps"]["settings"] == {"steps": 4} and rows["euler_4_steps"]["unet_samples"] == 8
    assert rows["cutoff_0"]["settings"] == {"cutoff": 0.0} and rows["cutoff_0"]["unet_samples"] == 2
    assert rows["bf16"]["quality"]["change"]["objects"]["value"] == 0 and rows["baseline_fp32"]["quality"]["change"] is None
    assert rows["euler_4_steps"]["took_s"] == {"load": 1.0, "timing": 2.0, "pictures": 3.0}
    assert rows["cutoff_0"]["took_s"] == {"timing": 2.0, "pictures": 3.0}, "it found the pipeline loaded"
    assert studies.estimate(ROWS, {"settings": SHARED, "rows": list(rows.values())}, SHARED) == {
        **{"baseline_fp32": 6 + studies.LOAD_S, "bf16": 6 + studies.LOAD_S, "euler_4_steps": 6 + studies.LOAD_S, "cutoff_0": 5}
    }


def test_the_study_has_the_rows_that_it_promises():
    rows = {row.id: row for row in sweeps.rows("cuda", 30)}
    assert set(path.NUMBERS) < set(rows) and len(rows) == len(sweeps.rows("cuda", 30)) == 78
    assert {f"{i}_alone" for i in path.NUMBERS if i not in ("baseline_fp32", "bf16")} < set(rows)
    assert {"noise_bf16", "noise_seed", "engine_bf16", "int8_filter", "int8_every_layer"} < set(rows)
    for name in ("euler", "euler_ancestral", "dpm", "dpm_karras", "unipc"):
        assert {f"{name}_{n}_steps" for n in (4, 6, 8, 10, 15, 20, 30, 50)} < set(rows)
    assert {f"cutoff_{share:g}" for share in (0, 0.2, 0.4, 0.6, 0.8, 1)} < set(rows)
    assert {"guided_0.1_0.4", "guided_0.4_1"} < set(rows) and "guided_0.4_0.4" not in rows
    silent = {i for i, row in rows.items() if not row.compares}
    assert silent == {"baseline_fp32", "noise_seed", *(f"euler_ancestral_{n}_steps" for n in sweeps.STEPS)}
    order = [row.pipeline for row in rows.values()]
    assert sum(a != b for a, b in zip(order, order[1:])) == len(set(order)) - 1, "each pipeline is prepared once"
    assert "engine_bf16" not in {row.id for row in sweeps.rows("cpu", 30)}
    assert all(isinstance(row, Recipe) for row in rows.values())


def test_a_row_of_the_path_draws_what_the_path_draws(pocket):
    """The study shares pipelines between rows, so that the last two steps are not applied by `path.prepare`."""
    last = next(row for row in sweeps.rows("cpu", 5) if row.id == "cfg_cutoff")
    eager = tuple(i for i in last.steps if i not in ("compile", "int8"))
    task = drawing.Task(64, 64, 5, 3.0, (("a red sphere",),), ((0,),))
    prepared, call = path.prepare(pocket, [*eager, "dpm_20", "cfg_cutoff"], steps=5)
    wanted = drawing.drawer(prepared, task, **call)(0, "np")
    shared, _ = path.prepare(models.load("pocket"), eager, steps=5)
    shared.set_progress_bar_config(disable=True)
    own = shared.scheduler
    gallery.sampling(shared, own, next(row for row in sweeps.rows("cpu", 5) if row.id == "dpm_karras_4_steps"))
    call = gallery.sampling(shared, own, last)
    assert not shared.scheduler.config.use_karras_sigmas, "what another row sampled with leaves nothing behind"
    with unet_batches(shared) as batches:
        np.testing.assert_array_equal(drawing.drawer(shared, task, **call)(0, "np"), wanted)
    assert sum(batches) == last.samples(5)


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(pocket):
    asked, model = captions.test_prompts(3), models.MODELS["pocket"]
    tasks = [drawing.gallery(model, asked, batch) for batch in (1, 2, 3)]
    assert [len(task.prompts) for task in tasks] == [3, 2, 1] and len({sum(task.seeds, ()) for task in tasks}) == 1
    tasks = [drawing.Task(**vars(task) | {"height": 64, "width": 64, "steps": 2}) for task in tasks]
    drawn = [[torch.cat(parts) for parts in zip(*drawing.pictures(pocket, task))] for task in tasks]
    for images, latents in drawn[1:]:
        assert (images.int() - drawn[0][0].int()).abs().max() <= 1
        torch.testing.assert_close(latents, drawn[0][1], rtol=0, atol=1e-3)
    assert drawn[0][0].shape == (3, 3, 64, 64) and drawn[0][1].shape == (3, 4, 8, 8)


def test_int8_in_every_layer_spares_what_cannot_be_done_alone(pocket):
    spared = {layer.rule.name for layer in quantization.explain(pocket, every=True) if layer.rule}
    filtered = [layer for layer in quantization.explain(pocket, anyway=True) if layer.quantised]
    everywhere = [layer for layer in quantization.explain(pocket, every=True) if layer.quantised]
    assert spared == {"time embedding"} and len(everywhere) > len(filtered)
    quantization.int8(pocket, every=True)
    assert quantization.int8_layers(pocket) == len(everywhere)


def test_a_real_study_on_a_cpu_leaves_its_file_and_its_records(tmp_path, capsys):
    asked = ["bench", "pocket-quality", "--device", "cpu", "--out", str(tmp_path), "--pictures", "4", "--runs", "1"]
    asked += ["--steps", "1", "--height", "64", "--width", "64", "--only", "noise_bf16,euler_ancestral_4_steps"]
    assert main(asked) == 0
    rows = {row["id"]: row for row in results.read(tmp_path / "pocket-quality.json")["rows"]}
    assert list(rows) == ["baseline_fp32", "noise_bf16", "euler_ancestral_4_steps"]
    folder = tmp_path / "pocket-quality"
    kept = {i: records.read(folder / f"{i}.json.xz") for i in rows}
    assert rows["noise_bf16"]["quality"] == records.quality(kept["noise_bf16"], kept["baseline_fp32"])
    assert 30 < rows["noise_bf16"]["quality"]["psnr_db"]["value"] < 90
    assert rows["euler_ancestral_4_steps"]["quality"]["psnr_db"] is None and "psnr_db" not in kept["euler_ancestral_4_steps"]
    assert rows["noise_bf16"]["quality"]["frechet"] is None, "of so few pictures a covariance says nothing"
    assert all(row["latency_s"]["median"] > 0 for row in rows.values()) and (folder / "reference.png").exists()
    assert "4 prompts, a picture each" in capsys.readouterr().out


def test_renders_become_features_of_the_oracle(tmp_path):
    shelf = gallery.Shelf(tmp_path / "study" / "shelf")
    gallery.real({}, lambda phase: None, "cpu", captions.test_prompts(4), shelf)
    assert np.load(shelf.real).shape == (4, 128)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pocket-path", "--pictures", "9"], "--pictures is for quality studies"),
        (["pocket-quality", "--pictures", "0"], "--pictures 0 is too few"),
        (["pocket-quality", "--only", "fp4"], "unknown row 'fp4': choose from baseline_fp32"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, argv, said):
    assert main(["bench", *argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_the_references_pictures_nothing_is_compared(tmp_path, pocket):
    row = next(row for row in ROWS if row.id == "bf16")
    job = sharing.own_job(row, SHARED, "cpu", None)
    with pytest.raises(process.RowFailed, match="baseline_fp32 was not drawn"):
        gallery.judge(pocket, job, captions.test_prompts(4), gallery.Shelf(tmp_path), {})
