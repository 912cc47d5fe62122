import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from tiny import draw, unet_batches

from sdopt.compilation import compile_pipeline
from sdopt.errors import UserError
from sdopt.guidance import cutoff, guided_steps, interval, samples
from sdopt.timing import around_calls

GREY = np.full((1, 64, 64, 3), 0.5, dtype=np.float32)
HALF = np.concatenate([np.zeros((1, 64, 32, 1)), np.ones((1, 64, 32, 1))], axis=2).astype(np.float32)


def made_from(pipe, cls, **parts):
    parts = pipe.components | parts
    if "XL" not in cls.__name__:
        parts["requires_safety_checker"] = False
    made = cls(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def batches_of(pipe, **call):
    with unet_batches(pipe) as batches:
        draw(pipe, **call)
    return batches


@pytest.mark.parametrize("fraction, guided", [(0, 0), (0.01, 1), (0.4, 4), (0.46, 5), (0.99, 10), (1, 10)])
def test_the_batch_halves_after_that_fraction_of_the_steps(pipe, fraction, guided):
    call = {"num_inference_steps": 10} | cutoff(pipe, fraction)
    assert batches_of(pipe, **call) == [2] * guided + [1] * (10 - guided)


def test_the_two_ends_are_always_and_never(pipe):
    np.testing.assert_array_equal(draw(pipe, **cutoff(pipe, 1)), draw(pipe))
    np.testing.assert_array_equal(draw(pipe, **cutoff(pipe, 0)), draw(pipe, guidance_scale=1.0))


def test_after_the_cutoff_the_unet_sees_the_conditional_half_of_everything(pipe):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    draw(pipe, ["a red sphere", "two blue cubes"], (0, 1), negative_prompt=["fog"] * 2, **cutoff(pipe, 0.4))
    guided, alone = ({"text": call["encoder_hidden_states"]} | (call["added_cond_kwargs"] or {}) for call in seen[:2])
    assert guided.keys() == alone.keys() and len(alone) == (3 if hasattr(pipe, "text_encoder_2") else 1)
    for name, both in guided.items():
        assert torch.equal(alone[name], both[2:]), name
    assert not torch.equal(guided["text"][:2], guided["text"][2:])


def test_after_the_cutoff_the_conditional_prediction_stands_alone(pipe):
    """As if the scale fell to 1 and the UNet kept seeing both halves."""

    def scale_falls(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0 + 1e-9
        return tensors

    expected = draw(pipe, num_inference_steps=4, callback_on_step_end=scale_falls)
    np.testing.assert_allclose(draw(pipe, num_inference_steps=4, **cutoff(pipe, 0.5)), expected, rtol=0, atol=1e-4)


def test_each_of_several_prompts_keeps_its_own_picture(pipe):
    prompts, seeds = ["a red sphere", "two blue cubes at night", "a cone"], (0, 1, 2)
    call = {"num_inference_steps": 4, "negative_prompt": "fog"} | cutoff(pipe, 0.5)
    alone = [draw(pipe, prompt, (seed,), **call)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    call["negative_prompt"] = ["fog"] * 3
    with unet_batches(pipe) as batches:
        together = draw(pipe, prompts, seeds, **call)
    assert batches == [6, 6, 3, 3]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


def test_the_pipeline_is_as_it_was_afterwards(pipe):
    before = draw(pipe)
    call = cutoff(pipe, 0.4)
    once = draw(pipe, **call)
    np.testing.assert_array_equal(draw(pipe, **call), once)  # the same keywords serve again, ...
    assert batches_of(pipe, num_inference_steps=5, **call) == [2, 2, 1, 1, 1]  # ... also for other steps
    np.testing.assert_array_equal(draw(pipe), before)


def test_a_call_without_guidance_stays_without(pipe):
    assert batches_of(pipe, guidance_scale=1.0, **cutoff(pipe, 0.4)) == [1] * 3


def test_an_interval_guides_in_the_middle(pipe):
    call = {"num_inference_steps": 10} | interval(pipe, 0.3, 0.6)
    # the first step comes before any callback
    assert batches_of(pipe, **call) == [2, 1, 1, 2, 2, 2, 1, 1, 1, 1]
    np.testing.assert_array_equal(draw(pipe, **interval(pipe, 0, 1)), draw(pipe))


GRID = [(start, stop) for start in (0.0, 0.1, 0.25, 0.9) for stop in (0.2, 0.45, 1.0) if start < stop]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_interval_costs_the_samples_it_says(pocket, steps):
    small = {"height": 16, "width": 16, "num_inference_steps": steps}
    for start, stop in GRID:
        assert sum(batches_of(pocket, **small, **interval(pocket, start, stop))) == samples(steps, start, stop)
    for stop in (0.0, 0.01, 0.4, 1.0):
        assert sum(batches_of(pocket, **small, **cutoff(pocket, stop))) == samples(steps, stop=stop)


def test_what_samples_cost_is_plain():
    assert [samples(30, stop=stop) for stop in (0, 0.2, 0.4, 1)] == [30, 36, 42, 60]
    assert samples(30, 0.2, 0.6) == 30 + 12 + 1, "the first step comes before any callback"
    assert all(samples(steps, 0.0, stop) == steps + guided_steps(stop, steps) for steps in (5, 30) for _, stop in GRID)


def test_an_interval_saves_as_much_when_compiled(pocket, fresh_compiler):
    """Counted around the calls: a hook would be traced."""
    call = {"num_inference_steps": 5} | interval(pocket, 0.4, 0.8)
    eager, seen = draw(pocket, **call), []
    compile_pipeline(pocket, backend="aot_eager")

    def counted(run, sample, *args, **kwargs):
        seen.append(len(sample))
        return run(sample, *args, **kwargs)

    with around_calls(pocket.unet, counted):
        compiled = draw(pocket, **call)
    assert seen == [2, 1, 2, 2, 1] and sum(seen) == samples(5, 0.4, 0.8)
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-4)


def test_image_to_image_counts_the_steps_that_run(pocket):
    pipe = made_from(pocket, StableDiffusionImg2ImgPipeline)
    call = {"image": GREY, "strength": 0.5, "num_inference_steps": 8}
    assert batches_of(pipe, **call, **cutoff(pipe, 0.5)) == [2, 2, 1, 1]


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("kind", ["pocket", "sdxl"])
def test_inpainting_cuts_its_mask_too(kind, channels, request):
    stock = request.getfixturevalue(kind)
    cls = StableDiffusionInpaintPipeline if kind == "pocket" else StableDiffusionXLInpaintPipeline
    unet = UNet2DConditionModel.from_config(stock.unet.config, in_channels=channels).eval()
    pipe = made_from(stock, cls, unet=unet)
    call = {"image": GREY, "mask_image": HALF, "strength": 1.0, "num_inference_steps": 4}
    with unet_batches(pipe) as batches:
        images = draw(pipe, **call, **cutoff(pipe, 0.5))
    assert batches == [2, 2, 1, 1]
    assert images.shape[0] == 1 and np.isfinite(images).all()


@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnets_image_is_cut_too(pocket, guess):
    controlnet = ControlNetModel.from_unet(pocket.unet).eval()
    pipe = made_from(pocket, StableDiffusionControlNetPipeline, controlnet=controlnet)
    call = {"image": GREY, "guess_mode": guess, "num_inference_steps": 4}
    assert batches_of(pipe, **call, **cutoff(pipe, 0.5)) == [2, 2, 1, 1]


def test_bad_fractions_and_pipelines_are_refused(pocket, sdxl):
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"outside \[0, 1\]"):
            cutoff(pocket, fraction)
    for start, stop in ((0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(UserError, match="no interval"):
            interval(pocket, start, stop)
    pocket.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as loading an IP-Adapter does
    with pytest.raises(UserError, match="unload_ip_adapter"):
        cutoff(pocket)
    controlnet = ControlNetModel.from_unet(sdxl.unet)
    with pytest.raises(UserError, match="keeps doubled inputs"):
        cutoff(made_from(sdxl, StableDiffusionXLControlNetInpaintPipeline, controlnet=controlnet))
