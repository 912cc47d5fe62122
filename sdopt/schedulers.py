"""Step 8: the sampler. Fewer, better steps."""

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from sdopt import models
from sdopt.errors import UserError

DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SCHEDULERS = {name: (cls, {}) for name, cls in models.SCHEDULERS.items()} | {
    "dpm": (DPMSolverMultistepScheduler, DPM),
    "dpm_karras": (DPMSolverMultistepScheduler, DPM | {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
}


def use_scheduler(pipe, name: str):
    """Step 8: give `pipe` the scheduler "euler", "euler_ancestral", "dpm", "dpm_karras" or "unipc"; returns `pipe`.

    "dpm" is DPM++ 2M: DPM-Solver++ of second order, which reuses the model's last answer to follow the curve where
    Euler takes the tangent, at no extra UNet call; so 20 steps do for 30. The noise schedule, the prediction type
    (epsilon or v) and the spacing of the timesteps are the model's own: they are taken from the scheduler it has.
    "dpm_karras" spaces its steps as Karras et al. do, and what is made from it later keeps that; "unipc" corrects each
    step by the answer of the next. "euler_ancestral" draws noise in every step.
    Raises UserError for another name.
    Source: Lu et al., https://arxiv.org/abs/2211.01095; Karras et al., https://arxiv.org/abs/2206.00364; Zhao et al.,
    https://arxiv.org/abs/2302.04867. Introduced in notebooks/08_dpm_20.
    """
    if name not in SCHEDULERS:
        raise UserError(f"unknown scheduler '{name}': choose one of {', '.join(SCHEDULERS)}")
    cls, settings = SCHEDULERS[name]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    return pipe
