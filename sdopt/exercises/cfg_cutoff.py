"""Exercises of notebooks/09_cfg_cutoff."""

import torch

from sdopt import models
from sdopt.exercises import number


def _samples(answer):
    return number(
        answer, 84, 84,
        "a guided step computes two samples a prompt, the others one; 40 % of 30 steps are guided",
    )  # fmt: skip


def _combine(answer):
    for prompts in (1, 3):
        both = torch.randn(2 * prompts, 4, 8, 8, generator=torch.Generator().manual_seed(prompts))
        u, c = both[:prompts], both[prompts:]
        given = answer(both, 3.0)
        if not isinstance(given, torch.Tensor) or given.shape != u.shape:
            return f"for {prompts} prompt(s) return a tensor of shape {list(u.shape)}, half the rows of what came in"
        if torch.allclose(given, c + 3.0 * (c - u), atol=1e-4):
            return "the difference is added to the unconditional half, not to the conditional one"
        if not torch.allclose(given, u + 3.0 * (c - u), atol=1e-4):
            return f"wrong for {prompts} prompt(s): u + scale * (c - u), and all unconditional rows come first"
    return None


def _drop(answer):
    if not callable(answer):
        return "give a function of (pipe, step, timestep, tensors)"
    pipe = models.load("pocket")
    pipe.set_progress_bar_config(disable=True)
    seen, nothing = [], []

    def callback(pipe, step, timestep, tensors):
        given = answer(pipe, step, timestep, dict(tensors))
        if not isinstance(given, dict) or "prompt_embeds" not in given:
            nothing.append(step)
            return tensors
        return given

    hook = pipe.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            pipe(
                ["a red sphere", "a blue cube"], height=64, width=64, num_inference_steps=6, guidance_scale=3.0,
                output_type="latent", callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )  # fmt: skip
    except RuntimeError as error:
        if not nothing:
            return (
                "the pipeline stopped, latents and text no longer have the same number of rows: with two prompts "
                f"keep two rows and set pipe._guidance_scale ({str(error).splitlines()[0]})"
            )
    finally:
        hook.remove()
    if nothing:
        return f"after step {nothing[0]} it returned no tensors: return them after every step, changed or not"
    guided = [len(text) for text in seen].count(4)
    if guided != 3:
        return f"{guided} of 6 steps were guided, not 3: it is called after step 0, 1, 2 and so on"
    if not torch.equal(seen[-1], seen[0][2:]):
        return "the steps after it saw other text than the conditional half: [unconditional; conditional] is the order"
    return None


EXERCISES = {"09.1": _samples, "09.2": _combine, "09.3": _drop}
