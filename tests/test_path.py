import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from tiny import draw, unet_batches

from sdopt import path
from sdopt.attention import is_fused
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
        (["bf16", "cfg_cutoff"], {"cutoff": 1.5}, "outside"),
        (["bf16", "dpm_20"], {"steps": 0}, "use 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(pocket, ids, **options)
    assert pocket.unet.dtype == torch.float32
