"""Decoded images to PIL, rounded to bytes on the GPU: a quarter of what would be copied from it, and no pass of numpy's."""

from functools import partial

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


def put(processor):
    """Let `processor`, a pipeline's, round on the GPU, if it is diffusers' own; `take` undoes it."""
    if type(processor) is VaeImageProcessor and "postprocess" not in vars(processor):
        processor.postprocess = partial(postprocess, processor)


def take(processor):
    """Undo `put`."""
    if getattr(getattr(processor, "postprocess", None), "func", None) is postprocess:
        del processor.postprocess


def postprocess(processor, image, output_type="pil", do_denormalize=None):
    """`VaeImageProcessor.postprocess`, to the same pixels: what is not an image of three channels for PIL is left to it."""
    if output_type != "pil" or not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[1] != 3:
        return type(processor).postprocess(processor, image, output_type, do_denormalize)
    image = type(processor).postprocess(processor, image, "pt", do_denormalize)
    pixels = image.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    here = torch.empty_like(pixels, device="cpu", pin_memory=pixels.is_cuda)  # where a GPU writes without a detour
    return [Image.fromarray(one) for one in here.copy_(pixels).numpy()]
