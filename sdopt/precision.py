"""Steps 1 and 2: the number formats. What fp32 really means on a GPU, and half precision."""

from contextlib import nullcontext
from functools import wraps

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from sdopt.errors import UserError

# Whether (matrix products, cuDNN convolutions) may round their fp32 inputs to TF32's 10-bit mantissa and so run on
# tensor cores. The first is PyTorch's default; a baseline called "fp32" has to say which of the three it is.
TF32 = {"convolutions": (False, True), "everywhere": (True, True), "nowhere": (False, False)}
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDE = set()  # of HALF, those whose layers compute in float32 on a CPU: see `compute_wide`


def set_tf32(policy: str) -> None:
    """Allow TF32 in "convolutions" (PyTorch's default), "everywhere" or "nowhere"; a process-wide switch.

    Raises UserError for another word. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (TF32 on Ampere).
    Introduced in notebooks/01_baseline_fp32.
    """
    if policy not in TF32:
        raise UserError(f"unknown TF32 policy '{policy}': choose one of {', '.join(TF32)}")
    # The older of PyTorch's two TF32 interfaces: Inductor reads these, and refuses a process that has used both.
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = TF32[policy]


def full_precision(pipe, tf32: str = "convolutions"):
    """Step 1: every module of `pipe` in float32, TF32 as `tf32` says (see `set_tf32`); returns `pipe`.

    Raises UserError for an unknown TF32 policy. Introduced in notebooks/01_baseline_fp32.
    """
    set_tf32(tf32)
    return _to(pipe, torch.float32)


def half_precision(pipe, dtype: torch.dtype | None = None):
    """Step 2: every module of `pipe` in a 16-bit float, by default the one `half_dtype` picks; returns `pipe`.

    The VAE goes along. In bfloat16 that is safe, its range is float32's. In float16 SDXL's VAE overflows: the stock
    pipeline knows (`vae.config.force_upcast`) and runs that decoder in float32, which costs time but no picture.
    For a CPU without instructions for such floats see `compute_wide`. Raises UserError for a dtype that is no 16-bit float.
    Source: diffusers' "Accelerate inference" tutorial. Introduced in notebooks/02_bf16.
    """
    dtype = dtype or half_dtype(pipe.unet.device)
    if dtype not in HALF:
        raise UserError(f"{dtype} is no half precision: use torch.bfloat16 or torch.float16")
    compute_wide(pipe.unet.device)
    return _to(pipe, dtype)


def half_dtype(device) -> torch.dtype:
    """bfloat16, or float16 on a CUDA device before compute capability 8.0, which only emulates bfloat16."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def compute_wide(device) -> None:
    """Where `device` is a CPU without instructions for 16-bit floats, let their layers compute in float32 from now on.

    Factors of 16 bits, sums of 32, and what comes out rounded to 16: a CPU with such instructions does it in one go. Where
    it has none, PyTorch multiplies one number after another, and a picture takes many times as long as in float32. A
    switch for the whole process: of `torch.nn`'s Conv2d and Linear and diffusers' AttnProcessor, which is attention by the
    formula, for 16-bit floats on a CPU. All else, and layers with quantised weights, is computed as before. Introduced in
    notebooks/02_bf16.
    """
    for dtype in HALF if torch.device(device).type == "cpu" else ():
        if dtype not in WIDE and not _has_instructions(dtype):
            if not WIDE:
                _switch()
            WIDE.add(dtype)


def computes_in(module) -> torch.dtype:
    """The dtype in which a module's layers multiply: its own, or float32 where `compute_wide` has been at work."""
    return torch.float32 if _is_widened(module) else module.dtype


def _is_widened(x):
    """Of a tensor or a module: whether products of it are computed in float32."""
    return x.dtype in WIDE and x.device.type == "cpu"


def _has_instructions(dtype):
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALF[dtype]}_supported")()


def _switch():
    stock_conv, stock_linear, stock_attend = nn.Conv2d._conv_forward, nn.Linear.forward, AttnProcessor.__call__
    float_ = lambda bias: None if bias is None else bias.float()

    def conv_forward(self, x, weight, bias):
        if _is_widened(x):
            return stock_conv(self, x.float(), weight.float(), float_(bias)).to(x.dtype)
        return stock_conv(self, x, weight, bias)

    def linear_forward(self, x):
        if _is_widened(x) and type(self.weight) is nn.Parameter:
            return linear(x.float(), self.weight.float(), float_(self.bias)).to(x.dtype)
        return stock_linear(self, x)

    @wraps(stock_attend)  # Attention asks a processor for its parameters
    def attend(self, attn, hidden_states, *args, **kwargs):
        with _WideProducts() if _is_widened(hidden_states) else nullcontext():
            return stock_attend(self, attn, hidden_states, *args, **kwargs)

    nn.Conv2d._conv_forward, nn.Linear.forward, AttnProcessor.__call__ = conv_forward, linear_forward, attend


class _WideProducts(TorchFunctionMode):
    """Within, the two products of attention by the formula are computed in float32 and rounded to what they were given in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.bmm, torch.baddbmm):
            return func(*(each.float() for each in args), **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _to(pipe, dtype):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return pipe if all(module.dtype == dtype for module in modules) else pipe.to(dtype)
