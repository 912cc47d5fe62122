import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tiny import draw

from sdopt import compilation
from sdopt.compilation import Compiled, channels_last, compile_pipeline, compiled_kind, graphs, start_at_step_zero
from sdopt.errors import UserError
from sdopt.guidance import cutoff
from sdopt.schedulers import use_scheduler

SAME = {"rtol": 0, "atol": 1e-4}  # of a picture in [0, 1], drawn in fp32


def test_whole_with_a_cutoff_is_one_more_unet_graph_and_the_same_picture(sdxl, fresh_compiler):
    call = {"num_inference_steps": 4} | cutoff(sdxl, 0.5)
    eager = draw(sdxl, **call)
    assert compiled_kind(sdxl) is None
    # In the other layout aot_eager itself fails on a CPU: a GroupNorm meets strides that were not foreseen.
    assert compile_pipeline(channels_last(sdxl), "whole", backend="aot_eager").kind == "whole"
    compiled = []
    first = graphs(lambda: compiled.append(draw(sdxl, **call)))
    assert (first.compiled, first.breaks) == (3, {})  # UNet at batch 2 and 1, VAE decoder
    again = graphs(lambda: compiled.append(draw(sdxl, **call)))
    assert (again.compiled, again.breaks) == (0, {})
    for picture in compiled:
        np.testing.assert_allclose(picture, eager, **SAME)


def test_regional_compiles_the_attention_blocks_once_a_shape(pocket, fresh_compiler):
    eager = draw(pocket)
    done = compile_pipeline(pocket, backend="aot_eager")
    assert done == Compiled("regional", 11) and compiled_kind(pocket) == "regional"
    assert compile_pipeline(pocket, "whole", backend="aot_eager") == done  # applied twice it changes nothing
    first = graphs(lambda: np.testing.assert_allclose(draw(pocket), eager, **SAME))
    assert 0 < first.compiled <= 3 and not first.breaks  # 11 blocks, in 2 resolutions
    assert graphs(lambda: draw(pocket)).compiled == 0


def test_inductor_draws_the_same_picture(pocket, fresh_compiler):
    eager = draw(pocket)
    compile_pipeline(channels_last(pocket))
    np.testing.assert_allclose(draw(pocket), eager, **SAME)


def test_a_graph_break_is_counted(fresh_compiler):
    def broken(x):
        y = x + 1
        print(end="", flush=True)
        return y * 2

    counted = graphs(lambda: torch.compile(broken, backend="aot_eager")(torch.ones(2)))
    assert counted.compiled == 2 and sum(counted.breaks.values()) == 1


def test_on_a_gpu_the_modes_own_options_are_merged_with_the_tutorials(sdxl, monkeypatch):
    asked = []
    monkeypatch.setattr(type(sdxl.unet), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: asked.append((module, settings)))
    compile_pipeline(sdxl, options={"epilogue_fusion": True})
    assert [module for module, _ in asked] == [sdxl.unet, sdxl.vae.decoder]
    for _, settings in asked:
        assert settings["fullgraph"] and "mode" not in settings  # which torch.compile refuses beside options
        options = settings["options"]
        assert options["triton.cudagraphs"] and options["conv_1x1_as_mm"] and options["epilogue_fusion"]
        assert not any("coordinate_descent" in key for key in options), "that search takes minutes a graph"
        assert options.keys() <= set(torch._inductor.list_options())
    asked.clear()
    compile_pipeline(sdxl, mode="max-autotune")
    options = asked[0][1]["options"]
    assert options["coordinate_descent_tuning"] and options["max_autotune"]
    assert options.keys() <= set(torch._inductor.list_options())


def test_a_compiled_pipeline_saves_and_loads(sdxl, tmp_path):
    compile_pipeline(sdxl, "whole", backend="aot_eager")
    sdxl.save_pretrained(tmp_path)
    loaded = type(sdxl).from_pretrained(tmp_path)
    assert loaded.unet.state_dict().keys() == sdxl.unet.state_dict().keys()


def test_channels_last_changes_the_layout_and_not_the_picture(pipe):
    before = draw(pipe)
    channels_last(pipe)
    for model in (pipe.unet, pipe.vae):
        weights = [p for p in model.parameters() if p.ndim == 4]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    np.testing.assert_allclose(draw(pipe), before, **SAME)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpm"])
def test_the_scheduler_never_looks_its_step_up(pocket, name, monkeypatch):
    use_scheduler(pocket, name)
    before = draw(pocket)
    lookups = []
    stock = type(pocket.scheduler).index_for_timestep
    monkeypatch.setattr(
        type(pocket.scheduler), "index_for_timestep", lambda *args: lookups.append(args) or stock(*args)
    )
    draw(pocket)
    assert len(lookups) == 1
    start_at_step_zero(start_at_step_zero(pocket))
    np.testing.assert_array_equal(draw(pocket), before)
    assert len(lookups) == 1 and pocket.scheduler.sigmas.device.type == "cpu"


def test_a_pipeline_that_starts_midway_still_does(pocket):
    pipe = StableDiffusionImg2ImgPipeline(**pocket.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": np.full((1, 64, 64, 3), 0.5, dtype=np.float32), "strength": 0.5, "num_inference_steps": 4}
    before = draw(pipe, **call)
    np.testing.assert_array_equal(draw(start_at_step_zero(pipe), **call), before)


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("start", [0, 5, 6])  # Heun's timesteps 5 and 6 are the same one
def test_a_loop_of_ones_own_starts_anywhere(pocket, cls, start):
    def loop():
        scheduler, noise = pocket.scheduler, torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
        scheduler.set_timesteps(10)
        times = scheduler.timesteps[start:]
        sample = scheduler.add_noise(noise.abs(), noise, times[:1])
        for t in times[:-2]:  # where Heun starts in the middle, it has a step too few
            sample = scheduler.step(scheduler.scale_model_input(sample, t).tanh(), t, sample).prev_sample
        return sample

    pocket.scheduler = cls.from_config(pocket.scheduler.config)
    stock = loop()
    start_at_step_zero(pocket)
    assert torch.equal(loop(), stock)


def test_a_copied_scheduler_is_one_of_its_own(pocket):
    before = draw(pocket)
    draw(start_at_step_zero(pocket), num_inference_steps=5)
    original, pocket.scheduler = pocket.scheduler, copy.deepcopy(pocket.scheduler)
    np.testing.assert_array_equal(draw(pocket), before)
    assert len(original.timesteps) == 5


def test_bad_input(sdxl):
    with pytest.raises(UserError, match="use whole or regional"):
        compile_pipeline(sdxl, "half")
    with pytest.raises(UserError, match="unknown compile mode 'fast'"):
        compile_pipeline(sdxl, mode="fast")
    assert compiled_kind(sdxl) is None


@pytest.mark.parametrize(
    ("mode", "set_before", "found"),
    [
        ("max-autotune", {}, "here"),
        ("max-autotune", {"TRITON_PTXAS_PATH": "mine"}, "mine"),
        ("reduce-overhead", {}, None),
    ],
)
def test_a_search_assembles_with_what_its_workers_take(monkeypatch, tmp_path, mode, set_before, found):
    monkeypatch.setattr(compilation.os, "environ", dict(set_before))
    monkeypatch.setattr(compilation, "ASSEMBLER", tmp_path / "none")
    compilation.mode_options(mode)
    assert compilation.os.environ == set_before, "PyTorch for a CPU brings no assembler"
    (tmp_path / "here").touch()
    monkeypatch.setattr(compilation, "ASSEMBLER", tmp_path / "here")
    assert compilation.mode_options(mode) == torch._inductor.list_mode_options(mode)
    wanted = str(tmp_path / "here") if found == "here" else found
    assert compilation.os.environ.get("TRITON_PTXAS_PATH") == wanted


@pytest.mark.gpu
def test_no_step_of_a_scheduler_waits_for_the_gpu(pocket):
    for name in ("euler", "dpm"):
        use_scheduler(pocket, name)
        pipe = start_at_step_zero(pocket.to("cuda"))
        pipe.scheduler.set_timesteps(4, device="cuda")
        sample = torch.randn(1, 4, 8, 8, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in pipe.scheduler.timesteps:
                seen = pipe.scheduler.scale_model_input(sample, t)
                sample = pipe.scheduler.step(seen, t, sample, return_dict=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sample.isfinite().all()


@pytest.mark.gpu
def test_cuda_graphs_draw_the_same_picture_before_and_after_a_cutoff(pocket, fresh_compiler):
    pocket.to("cuda")
    use_scheduler(pocket, "dpm")
    call = {"num_inference_steps": 4} | cutoff(pocket, 0.5)
    eager = draw(pocket, **call)
    assert compile_pipeline(channels_last(pocket)).kind == "whole"
    for _ in range(3):  # warm-up, capture, replay
        np.testing.assert_allclose(draw(pocket, **call), eager, rtol=0, atol=2e-2)  # TF32 convolutions


def test_without_a_compiler_the_mend_is_named(pocket, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="install g\\+\\+"):
        compile_pipeline(pocket)
