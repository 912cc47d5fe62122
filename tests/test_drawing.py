import numpy as np
import pytest
import torch

from sdopt import drawing, models, quality


def small(**changes):
    task = drawing.task(models.MODELS["pocket"], runs=2)
    return drawing.Task(**{**vars(task), "height": 64, "width": 64, "steps": 2} | changes)


def test_a_task_of_pocket_asks_for_scenes_the_oracle_knows():
    task = drawing.task(models.MODELS["pocket"], runs=3)
    assert len(task.prompts) == len(task.seeds) == len(task.scenes) == 3 and task.seeds == ((0,), (1,), (2,))
    assert [text for text, _ in task.scenes] == [text for (text,) in task.prompts]
    assert len(set(task.prompts)) == 3
    other = drawing.task(models.MODELS["sdxl"], runs=2)
    assert other.scenes is None and other.prompts == ((models.MODELS["sdxl"].prompt,),) * 2


def test_a_run_is_drawn_the_same_each_time_and_a_step_may_change_the_call(pocket):
    draw = drawing.drawer(pocket, small())
    first, again, other = draw(0, "np"), draw(0, "np"), draw(1, "np")
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    calls = []
    hook = pocket.unet.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    drawing.drawer(pocket, small(), num_inference_steps=3, guidance_scale=1.0)(0)
    hook.remove()
    assert calls == [1, 1, 1]


def test_what_is_measured_is_a_row_and_its_pictures(pocket):
    phases, calls = [], []
    hook = pocket.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    numbers, pictures = drawing.measure(pocket, small(), phases.append)
    hook.remove()
    assert phases == ["first call"]
    assert len(calls) == 3 * 2, "one call to warm up and one a run, of two steps each: a CPU's stages are the last one's"
    assert len(numbers["latency_s"]["runs"]) == len(pictures) == 2 and numbers["stages_ms"]["unet_calls"] == 2
    assert pictures[0][0].size == (64, 64)
    assert quality.drift(pictures[0], drawing.drawer(pocket, small())(0))["exact"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_no_measurement(pocket, value):
    with torch.no_grad():
        pocket.vae.decoder.conv_out.bias.fill_(value)
    with pytest.raises(ArithmeticError, match="not finite"), np.errstate(invalid="ignore"):
        drawing.measure(pocket, small())
    assert "decode" not in vars(pocket.vae), "nothing stays behind"
