"""A picture's beginning, before the UNet's first call: while the GPU is busy with the prompt, and the CPU would wait for it.

What the UNet sees to before a picture (are its graphs still right, what follows from its weights) takes milliseconds, in which a GPU
that waits for the first step does nothing. A pipeline's call encodes its prompt first: by then its picture has begun, and until the
UNet is called nothing else runs but that call. An `encode_prompt` outside of a call begins nothing, since weights may change after it.
"""

import inspect
import sys
from types import MethodType

from sdopt.engine import graphs, unet

NAME = "encode_prompt"


def put(pipe):
    """Let a picture of `pipe` begin when its prompt has been encoded; `take` undoes it."""
    if NAME not in vars(pipe) and hasattr(pipe, NAME):
        setattr(pipe, NAME, MethodType(encode_prompt, pipe))  # of a copy of the pipeline it becomes the copy's


def take(pipe):
    """Undo `put`."""
    if getattr(vars(pipe).get(NAME), "__func__", None) is encode_prompt:
        delattr(pipe, NAME)


def encode_prompt(pipe, *args, **kwargs):
    """The pipeline's own, and a picture's beginning: after it, or before it where it takes a GPU longer than the prompt does."""
    forward, call = vars(pipe.unet).get("forward"), sys._getframe(1)
    if not isinstance(forward, unet.UNet) or call.f_code is not inspect.unwrap(type(pipe).__call__).__code__:
        return type(pipe).encode_prompt(pipe, *args, **kwargs)
    before = graphs.mark(pipe.unet)
    if forward.rounding:
        forward.begin(before, call)
    encoded = type(pipe).encode_prompt(pipe, *args, **kwargs)
    if not forward.rounding:
        forward.begin(before, call)
    return encoded
