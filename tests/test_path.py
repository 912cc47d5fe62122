from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from tiny import draw, unet_batches

from sdopt import levels, path, results
from sdopt.attention import is_fused
from sdopt.bench import recipes, sweeps
from sdopt.compilation import compiled_kind
from sdopt.errors import UserError
from sdopt.path import STEPS, Options, prepare

TAUGHT = ("baseline_fp32", "bf16", "sdpa", "compile", "fused_qkv", "int8", "tiny_vae", "dpm_20", "cfg_cutoff")
EAGER = {"compiler": {"backend": "aot_eager"}}


def test_the_steps_are_taught_in_this_order_each_in_its_notebook():
    assert tuple(step.id for step in STEPS) == TAUGHT
    assert [step.notebook for step in STEPS] == [f"{n:02}_{i}" for n, i in enumerate(TAUGHT, 1)]
    assert set(path.ORDER) == set(TAUGHT) - {"cfg_cutoff"}


def test_the_whole_path_draws(pipe, fresh_compiler):
    prepared, call = prepare(pipe, reversed(TAUGHT), steps=5, **EAGER)
    assert prepared is pipe and call["num_inference_steps"] == 5
    assert {pipe.unet.dtype, pipe.vae.dtype} == {torch.bfloat16}
    assert is_fused(pipe.unet) and isinstance(pipe.vae, AutoencoderTiny) and compiled_kind(pipe) == "regional"
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    with unet_batches(pipe) as batches:
        pictures = draw(pipe, ["a red sphere", "a blue cube"], (0, 1), **call)
    assert batches == [4] * 2 + [2] * 3
    assert pictures.shape == (2, 64, 64, 3) and np.isfinite(pictures).all()


def test_steps_are_applied_in_their_own_order_whatever_order_they_come_in(sdxl, monkeypatch):
    applied = []
    steps = tuple(
        path.Step(step.id, step.title, step.notebook, lambda pipe, o, i=step.id: applied.append(i)) for step in STEPS
    )
    monkeypatch.setattr(path, "STEPS", steps)
    prepare(sdxl, ("compile", "int8", "sdpa", "fused_qkv", "cfg_cutoff"))
    assert applied == ["sdpa", "fused_qkv", "int8", "compile"]
    prepare(sdxl, ("compile", "int8"))  # carried already
    assert applied == ["sdpa", "fused_qkv", "int8", "compile"]


def test_applied_twice_the_path_draws_the_same(pocket):
    ids = [i for i in TAUGHT if i != "compile"]
    _, call = prepare(pocket, ids, steps=3)
    once = draw(pocket, **call)
    _, again = prepare(pocket, ids, steps=3)
    np.testing.assert_array_equal(draw(pocket, **again), once)


def test_the_baseline_alone_is_plain_fp32(pocket):
    _, call = prepare(pocket, ["baseline_fp32"])
    assert call == {}
    assert {type(processor) for processor in pocket.unet.attn_processors.values()} == {AttnProcessor}


def test_twenty_steps_unless_the_others_take_fewer(pocket):
    assert prepare(pocket, ["dpm_20"], steps=30)[1] == {"num_inference_steps": 20}
    assert prepare(pocket, ["dpm_20"], steps=4)[1] == {"num_inference_steps": 4}
    assert Options().steps == 20


def test_a_step_that_comes_too_late_is_refused(pocket):
    prepare(pocket, ["int8"])
    with pytest.raises(UserError, match="'fused_qkv' comes before 'int8'"):
        prepare(pocket, ["fused_qkv"])


def test_bad_input_is_refused_before_anything_changes(pocket):
    for ids, options, words in (
        (["fp8"], {}, "unknown step 'fp8'"),
        (["bf16"], {"speed": 9}, "unknown option 'speed'"),
        (["bf16"], {"compiler": None}, "compiler is None: give the keywords"),
        (["dpm_20"], {"steps": 12.5}, "12.5 steps draw no picture"),
        (["bf16", "cfg_cutoff"], {"cutoff": 1.5}, "outside"),
        (["bf16", "dpm_20"], {"steps": 0}, "use 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(pocket, ids, **options)
    assert pocket.unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("gpu", "left_out"),
    [("NVIDIA H200", {"int8"}), ("NVIDIA H100 80GB HBM3", {"int8"}), ("NVIDIA A100-SXM4-40GB", set())],
)
def test_what_brings_nothing_on_a_gpu_is_not_worthwhile_there(gpu, left_out):
    assert path.worthwhile(gpu) == tuple(i for i in TAUGHT if i not in left_out)


def test_worthwhile_on_a_cpu_is_what_the_recorded_path_bears_out():
    """What is left out did not help clearly in the recorded walk, and nothing that clearly hurt was kept."""
    recorded = Path(path.__file__).parents[1] / "figures" / "data" / "cpu-2-cores" / "pocket-path.json"
    rows = {row["id"]: row for row in results.read(recorded)["rows"]}
    about = ("steps", "scheduler", "cutoff", "guidance_scale")
    for before, i in zip(TAUGHT, TAUGHT[1:]):
        gain = results.compare(rows[i], rows[before], about)
        helps = gain["clear"] and gain["speedup"] > 1
        hurts = gain["clear"] and gain["speedup"] < 1
        assert not (helps if i not in path.worthwhile("cpu") else hurts), i


def recorded_quality():
    return results.read(Path(path.__file__).parents[1] / "figures" / "data" / "nvidia-h200" / "pocket-quality.json")


def test_the_levels_are_what_the_recorded_study_recommends():
    study, rows = recorded_quality(), {row.id: row for row in sweeps.rows("cuda", 30)}
    measured = {level: rows[row["id"]] for level, row in levels.recommended(study).items()}
    for level, row in measured.items():
        assert row.pipeline == "sweeps" and row.apply is recipes.on_engine and row.steps == ("bf16", "sdpa"), level
        choice = path.recommended(level, "NVIDIA H200")
        same = ("scheduler", "num_steps", "start", "stop")
        assert [getattr(choice, name) for name in same] == [getattr(row, name) for name in same], level
        assert choice.engine and choice.steps == row.steps
    assert list(path.LEVELS) == list(levels.LEVELS)


def test_lossless_leaves_out_the_steps_that_are_not_lossless_alone():
    study = recorded_quality()
    good = {row["id"] for row in levels.qualifying(study, "lossless")}
    alone = {i: "bf16" if i == "bf16" else f"{i}_alone" for i in TAUGHT[1:]}
    assert {i for i, row in alone.items() if row not in good} == set(path.LOSSY)
    assert path.recommended("lossless", "cpu").steps == ("baseline_fp32", "bf16", "sdpa", "compile")
    assert not path.recommended("fastest", "cpu").engine
    with pytest.raises(UserError, match="unknown level 'best': choose one of lossless, balanced, fastest"):
        path.recommended("best")


def test_a_recommendation_is_prepared_like_ids(pocket):
    choice = path.Recommendation(("sdpa",), scheduler="dpm_karras", num_steps=5, stop=0.4)
    prepared, call = prepare(pocket, choice)
    assert prepared is pocket and pocket.scheduler.config.use_karras_sigmas and call["num_inference_steps"] == 5
    with unet_batches(pocket) as batches:
        draw(pocket, **call)
    assert batches == [2] * 2 + [1] * 3
    _, call = prepare(pocket, path.Recommendation((), num_steps=5, start=0.4, stop=0.8))
    with unet_batches(pocket) as batches:
        draw(pocket, **call)
    assert batches == [2, 1, 2, 2, 1], "the first step is guided in any case"


def test_a_level_by_its_name_is_for_the_device_the_pipeline_is_on(pocket, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    assert path.recommended("balanced").engine and path.recommended("balanced", "cuda:0").engine
    assert path.worthwhile("cuda:0") == path.worthwhile("NVIDIA H200") and not path.recommended("balanced", "CPU").engine
    monkeypatch.setattr(path, "LOSSY", (*path.LOSSY, "compile"))
    _, call = prepare(pocket, "balanced")
    assert call == {"num_inference_steps": 8} and "bf16" in pocket._sdopt_steps


def test_a_level_takes_the_pipelines_own_scheduler_back(pocket):
    own = pocket.scheduler
    plain = path.sampling(pocket, "euler", 6) and pocket.scheduler.config
    path.sampling(pocket, "dpm_karras")
    assert path.sampling(pocket, "euler", 6) == {"num_inference_steps": 6}
    assert pocket.scheduler.config == plain, "what was sampled with in between leaves nothing behind"
    assert path.sampling(pocket) == {} and pocket.scheduler is own
    given = pocket.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    path.sampling(pocket, "euler")
    assert path.sampling(pocket) == {} and pocket.scheduler is given, "another was given meanwhile: that is its own now"


def test_a_recommendation_is_refused_before_anything_changes(pocket):
    scheduler, here = pocket.scheduler, path.recommended("lossless", "cpu")
    for choice, words in (
        (path.recommended("balanced", "NVIDIA H200"), "chosen for a CUDA GPU"),
        (replace(here, scheduler="ddim"), "unknown scheduler 'ddim'"),
        (replace(here, num_steps=0), "0 steps draw no picture"),
        (replace(here, num_steps=2.5), "2.5 steps draw no picture"),
        (replace(here, num_steps="6"), "6 steps draw no picture"),
        (replace(here, stop=None), "guidance from 0.0 to None"),
        (replace(here, start=0.8, stop=0.4), "is no interval"),
        ("bf16", r"'bf16' is one step: give a list of steps, \[\"bf16\"\]"),
        ("best", "unknown level 'best'"),
        (None, "None is no list of steps"),
        (path.recommended, "is no list of steps"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(pocket, choice)
        assert pocket.unet.dtype == torch.float32 and pocket.scheduler is scheduler, words
    for ask in (lambda: path.recommended(["lossless"]), lambda: path.worthwhile(0), lambda: path.recommended(gpu="")):
        with pytest.raises(UserError, match="unknown level|give its name"):
            ask()
    prepare(pocket, ["tiny_vae"])
    with pytest.raises(UserError, match="carries 'tiny_vae', which this leaves out"):
        prepare(pocket, "lossless")


def test_int8_is_told_when_it_is_wanted_anyway(sdxl, monkeypatch):
    told = []
    monkeypatch.setattr(path, "int8", lambda pipe, anyway: told.append(anyway))
    prepare(sdxl, ["int8"])
    sdxl._sdopt_steps = ()
    prepare(sdxl, ["int8"], int8_anyway=True)
    assert told == [False, True]
