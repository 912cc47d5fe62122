"""A pipeline on fused kernels and CUDA graphs: about the speed of compiled code, without a compiler's wait."""

import inspect

import torch
from diffusers import UNet2DConditionModel

from sdopt import models, timing
from sdopt.errors import UserError

try:
    from sdopt.engine import ahead, fp8, fused, graphs, hooks, pictures, text, unet
except ModuleNotFoundError as missing:  # Triton, which comes with PyTorch for CUDA alone
    MISSING = missing.name
else:
    MISSING = None

GRAPHS = 8  # of each model: two a size, since a cutoff changes the batch


def prepare(
    pipe, keep: int = GRAPHS, precision: str | None = None, scales: str = "row", filter: str = "measured"
):
    """Let UNet and VAE decoder of `pipe` run on fused kernels inside CUDA graphs, from the next call on; returns `pipe`.

    Its CLIP text encoders run inside CUDA graphs, too, and pictures are rounded to bytes before they leave the GPU.

    Any stock pipeline around a `UNet2DConditionModel`: Stable Diffusion 1.x, 2.x and XL, text to image, image to image,
    inpainting, with or without a ControlNet. A size's first picture captures its graphs, in seconds; `keep` graphs of
    each model are kept, the least recently used going first. Pictures agree with the eager pipeline's up to the rounding
    of its dtype. LoRAs, other schedulers, callbacks and new sizes are seen by themselves; what is not known to the
    engine (an IP-Adapter, other attention processors, FreeU) runs eagerly, and a warning says so once. So does the rest of
    a picture in which a callback switches one of these or a LoRA; other changes to modules show from the next picture on.
    Weights go to channels_last memory, and the scheduler knows a picture's first step without asking the GPU. Twice is once.

    `precision` "fp8", for a pipeline in bfloat16: most of the UNet's products with weights in e4m3, and inputs rounded to
    it as they come (see `fp8`); a ControlNet's and the VAE's stay as they are. `scales`: "row", one a row of the input and
    one an output, or "tensor", one each, which is faster. `filter`: "measured", the products that are faster so, or
    "all", to see what rounding does to a small model.
    Raises UserError without a GPU, for a compiled pipeline, one whose models offload, another model than this, `keep`
    below 1, one that is prepared in another precision or lies on a GPU that is not the current one, and of fp8 for a GPU
    before compute capability 8.9.
    Introduced in notebooks/12_cuda_graphs, `precision` in notebooks/13_fp8.
    """
    if MISSING:
        raise UserError(f"the engine needs a CUDA GPU, and PyTorch's package for it: {MISSING} is not installed")
    denoiser, decoder = getattr(pipe, "unet", None), getattr(getattr(pipe, "vae", None), "decoder", None)
    if type(denoiser) is not UNet2DConditionModel or decoder is None:
        raise UserError(f"{type(pipe).__name__} has no UNet2DConditionModel and VAE that the engine could run")
    if keep < 1:
        raise UserError(f"keep={keep} leaves no room for a graph: give 2 or more, since a cutoff changes the batch")
    rounding = fp8.asked(precision, scales, filter)
    if is_prepared(pipe):
        if denoiser.forward.rounding != rounding:
            raise UserError("the pipeline is prepared in another precision: call engine.restore(pipe) first")
        return pipe
    if not graphs.can_capture(denoiser):
        raise UserError('the engine needs a CUDA GPU: call pipe.to("cuda") first, or keep the pipeline as it is')
    graphs.check_current(denoiser)
    if timing.compiled_parts(denoiser):
        raise UserError("the pipeline is compiled, which is another way to the same: load it again for the engine")
    encoders = _text_encoders(pipe)
    for part in (denoiser, decoder, *encoders):
        if "forward" in vars(part) and not _is_captured(part):  # by a pipeline that shares it, it may be
            raise UserError(f"{type(part).__name__} has another forward (offloading?): prepare first, offload after")
    if any(_is_mixed(weight) for part in (denoiser, decoder) for weight in part.parameters()):
        raise UserError("its weights come from inference mode and were changed outside it: load the pipeline outside it")
    if rounding:
        fp8.check(denoiser, rounding)
    memory = graphs.Memory()
    told = "_init_step_index" in vars(pipe.scheduler)
    turned = _contiguous_images(pipe)
    models.start_at_step_zero(pipe)
    _turn(turned, lambda data: data.contiguous(memory_format=torch.channels_last))
    control = getattr(pipe, "controlnet", None)
    for part in (denoiser, decoder, control):
        if part is not None:
            fused.fuse(part)
    denoiser.forward = unet.UNet(denoiser, memory, keep)
    denoiser.forward.before, denoiser.forward.rounding = (turned, None if told else pipe.scheduler, control), rounding
    for part, kind in ((decoder, graphs.Decoder), *((encoder, text.TextEncoder) for encoder in encoders)):
        if not _is_captured(part):
            part.forward = kind(part, memory, keep)
    pictures.put(getattr(pipe, "image_processor", None))
    hooks.put(denoiser)
    ahead.put(pipe)
    return pipe


def restore(pipe):
    """Undo `prepare`: diffusers' own forwards, the weights in the memory layout they had; returns `pipe`. Twice is once.

    What other pipelines share with it (a VAE, a text encoder) runs eagerly in these, too. Raises UserError where offloading
    was put over the engine. Introduced in notebooks/12_cuda_graphs.
    """
    if MISSING:
        return pipe
    parts = pipe.unet, pipe.vae.decoder, *_text_encoders(pipe)
    if any(map(_is_covered, parts)):
        mend = "call pipe.remove_all_hooks() first, or load the pipeline again where it is offloaded in groups"
        raise UserError(f"offloading was put over the engine: {mend}")
    turned, scheduler, control = pipe.unet.forward.before if is_prepared(pipe) else ((), None, None)
    captured = [part for part in parts if _is_captured(part)]  # perhaps all but the UNet, if that is another now
    for part in captured:
        del part.forward
    for part in (*captured, control, getattr(pipe, "controlnet", None)) if captured else ():  # it may be another now
        if part is not None:
            fused.release(part)
    _turn(turned, lambda data: data.clone(memory_format=torch.contiguous_format))
    if scheduler is not None:
        vars(scheduler).pop("_init_step_index", None)
    pictures.take(getattr(pipe, "image_processor", None))
    hooks.take(pipe.unet)
    ahead.take()
    return pipe


def is_prepared(pipe) -> bool:
    """Whether `prepare` has been applied to the pipeline's UNet."""
    return not MISSING and isinstance(vars(pipe.unet).get("forward"), unet.UNet)


def fp8_layers(pipe) -> int:
    """How many layers of the UNet the engine has computed in e4m3, those that are joined counted as one.

    Introduced in notebooks/13_fp8.
    """
    held = pipe.unet.forward.held if is_prepared(pipe) else None
    return sum(layer.used for layer in held.rounded.values()) if held else 0


def _is_captured(part):
    return isinstance(vars(part).get("forward"), graphs.Captured)


def _is_covered(part):
    """Whether offloading has put another forward over the engine's, which accelerate and diffusers keep below theirs."""
    below = getattr(part, "_old_forward", vars(part).get("forward"))
    below = inspect.unwrap(below, stop=lambda forward: isinstance(forward, graphs.Captured))
    return isinstance(below, graphs.Captured) and not _is_captured(part)


def _text_encoders(pipe):
    parts = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [part for part in parts if type(part) in text.KINDS]


def _contiguous_images(pipe):
    """The weights that channels_last will turn."""
    parts = (pipe.unet, pipe.vae, getattr(pipe, "controlnet", None))
    weights = [p for part in parts if part is not None for p in part.parameters()]
    return [weight for weight in weights if weight.ndim == 4 and weight.is_contiguous()]


def _turn(weights, layout):
    """Give each weight what `layout` makes of its data."""
    for weight in weights:
        with torch.inference_mode(weight.is_inference()):  # in the mode that made it: see _is_mixed
            weight.data = layout(weight.data)


def _is_mixed(weight):
    """Whether a tensor of inference mode was given data outside it: PyTorch refuses views of such a one, at a picture."""
    try:
        return not weight.is_inference() and weight._version < 0
    except RuntimeError:
        return True
