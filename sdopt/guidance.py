"""Step 9: classifier-free guidance only while it matters."""

from sdopt.errors import UserError

# What guidance doubles, [unconditional; conditional] along the batch. A pipeline's loop takes back from the callback
# only some of what it lists as callback inputs: these are the pipelines that take back all they doubled.
DOUBLED = ("prompt_embeds", "add_text_embeds", "add_time_ids", "mask", "masked_image_latents", "image", "control_image")
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
)


def cutoff(pipe, fraction: float = 0.4) -> dict:
    """Step 9: drop guidance after `fraction` of the steps; returns the call's keywords.

    Guided steps run the UNet on 2 * batch samples, the others on batch. round(fraction * steps) steps are guided, and
    never fewer than 1, since a callback comes after a step; of the two ends, 1 guides always and 0 never (it is the
    keyword guidance_scale=1). The steps counted are those that run: an image-to-image call at strength 0.5 runs half.
    Raises UserError for a fraction outside [0, 1] and for a pipeline whose doubled inputs cannot be cut.
    Source: diffusers' callback guide; Castillo et al., https://arxiv.org/abs/2312.12487. Introduced in
    notebooks/09_cfg_cutoff.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"cutoff {fraction:g} is outside [0, 1]: it is the share of the steps that are guided")
    if fraction == 0:
        return {"guidance_scale": 1.0}
    return {} if fraction == 1 else interval(pipe, 0.0, fraction)


def guided_steps(stop: float, steps: int) -> int:
    """How many of `steps` are guided when guidance ends after the share `stop` of them: never fewer than the first.

    Introduced in notebooks/09_cfg_cutoff.
    """
    return max(1, round(stop * steps))


def guides(step: int, steps: int, start: float, stop: float) -> bool:
    """Whether step number `step` of `steps` (from 0) is guided in the interval from `start` to `stop`."""
    return step == 0 or round(start * steps) <= step < guided_steps(stop, steps)


def samples(steps: int, start: float = 0.0, stop: float = 1.0) -> int:
    """How many samples the UNet sees for one picture of `steps`, guided from `start` to `stop`: its cost.

    Two in a guided step, one in any other. `stop` 0 is a call without guidance, where no step is guided; otherwise the
    first always is (see `interval`).
    """
    return steps + (sum(guides(step, steps, start, stop) for step in range(steps)) if stop > 0 else 0)


def interval(pipe, start: float, stop: float) -> dict:
    """Guide from `start` to `stop` (shares of the steps, 0 <= start < stop <= 1); returns the call's keywords.

    The first step is guided too, whatever `start` says: the callback that switches guidance comes after a step.
    Raises UserError for another interval and for a pipeline whose doubled inputs cannot be cut.
    Source: Kynkäänniemi et al., https://arxiv.org/abs/2404.07724. Introduced in notebooks/09_cfg_cutoff.
    """
    if not 0 <= start < stop <= 1:
        raise UserError(f"guidance from {start:g} to {stop:g} is no interval: use 0 <= start < stop <= 1")
    _check(pipe)
    keys = [key for key in DOUBLED if key in pipe._callback_tensor_inputs]
    call = {}  # what the running call came with: its doubled tensors and its guidance scale

    def switch(pipe, step, timestep, tensors):
        if step == 0:
            call.update(scale=pipe.guidance_scale, on=pipe.do_classifier_free_guidance, tensors=dict(tensors))
        if not call["on"]:
            return tensors
        guided = guides(step + 1, pipe.num_timesteps, start, stop)
        if guided == pipe.do_classifier_free_guidance:
            return tensors
        # Private, but the only way: the loop reads it before every step, and the next call sets it anew.
        pipe._guidance_scale = call["scale"] if guided else 1.0
        both = call["tensors"]
        rows = both["prompt_embeds"].shape[0]
        return dict(both) if guided else {key: _conditional(value, rows) for key, value in both.items()}

    return {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": keys}


def _conditional(value, rows):
    """The conditional half of what guidance doubled to `rows` rows; anything else as it is."""
    if isinstance(value, (list, tuple)):  # one image for each of several ControlNets
        return [_conditional(part, rows) for part in value]
    # A ControlNet in guess mode sees the conditional half only, so its image is not doubled; no mask means no tensor.
    return value.chunk(2)[1] if value is not None and value.shape[0] == rows else value


def _check(pipe):
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise UserError(
            f"guidance cannot be cut in a {name}, it keeps doubled inputs: use one of {', '.join(PIPELINES)}"
        )
    if pipe.unet.config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise UserError("guidance cannot be cut with an IP-Adapter, its image stays doubled: unload_ip_adapter() first")
