import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import draw, unet_batches

from sdopt.errors import UserError
from sdopt.schedulers import use_scheduler

MODELS_OWN = ("prediction_type", "timestep_spacing", "beta_schedule", "beta_start", "beta_end", "steps_offset")


@pytest.mark.parametrize(
    "name, cls",
    [
        ("euler", EulerDiscreteScheduler),
        ("euler_ancestral", EulerAncestralDiscreteScheduler),
        ("dpm", DPMSolverMultistepScheduler),
        ("dpm_karras", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_a_new_scheduler_keeps_what_is_the_models_own(pipe, name, cls):
    before = dict(pipe.scheduler.config)
    use_scheduler(pipe, name)
    assert type(pipe.scheduler) is cls
    assert {key: pipe.scheduler.config[key] for key in MODELS_OWN} == {key: before[key] for key in MODELS_OWN}


def test_dpm_is_of_second_order_and_asks_the_unet_once_a_step(pocket):
    use_scheduler(pocket, "dpm")
    assert (pocket.scheduler.config.algorithm_type, pocket.scheduler.config.solver_order) == ("dpmsolver++", 2)
    with unet_batches(pocket) as batches:
        draw(pocket, num_inference_steps=5)
    assert batches == [2] * 5


def test_dpm_comes_closer_to_the_curve_than_euler_in_as_many_steps(pocket):
    """Against 60 small steps, at the size pocket is made for: the order of a solver shows in its error."""
    settings = {"height": 256, "width": 256, "guidance_scale": 1}
    use_scheduler(pocket, "dpm")
    curve = draw(pocket, num_inference_steps=60, **settings)
    error = {}
    for name in ("dpm", "euler"):
        use_scheduler(pocket, name)
        error[name] = np.square(draw(pocket, num_inference_steps=12, **settings) - curve).mean()
    assert error["dpm"] < error["euler"] / 2


@pytest.mark.parametrize("name", ["dpm_karras", "unipc"])
def test_the_other_solvers_follow_the_same_curve(pocket, name):
    """Of 12 steps each, at the size pocket is made for; and Karras's steps are spaced otherwise."""
    settings = {"height": 256, "width": 256, "guidance_scale": 1, "num_inference_steps": 12}
    curve = draw(use_scheduler(pocket, "dpm"), **settings)
    own = pocket.scheduler.sigmas
    assert np.square(draw(use_scheduler(pocket, name), **settings) - curve).mean() < 10 ** (-25 / 10)
    assert np.allclose(pocket.scheduler.sigmas, own, rtol=1e-3) == (name == "unipc")


def test_applied_twice_it_changes_nothing(pocket):
    once = draw(use_scheduler(pocket, "dpm"))
    np.testing.assert_array_equal(draw(use_scheduler(pocket, "dpm")), once)


def test_an_unknown_scheduler_is_refused(pocket):
    with pytest.raises(UserError, match="euler, euler_ancestral, dpm"):
        use_scheduler(pocket, "heun")
