"""Steps 1, 3 and 5: who computes attention, with which kernel, and from how many projections."""

import ctypes
import importlib.util
import re
from collections.abc import Callable, Collection
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch.nn import Linear
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sdopt.errors import UserError
from sdopt.profiling import profile

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


FUSED = {  # how the kernels of each are called, or on a CPU its operator
    "cudnn": r"cudnn.*(sdpa|attention)",
    "flash": r"^(?!.*cudnn).*(flash_fwd|FlashAttnFwd|scaled_dot_product_flash_attention)",
    "efficient": r"fmha_cutlass|scaled_dot_product_efficient_attention",
    "ours": r"^_(self|prompt)_attention$",  # the engine's
}


class PinnedProcessor:
    """A stock attention processor that may use one SDPA kernel only; PyTorch picks among all of them otherwise."""

    def __init__(self, stock, backend: str):
        self.stock, self.backend = stock, backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        with sdpa_kernel(BACKENDS[self.backend]):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


REPLACEABLE = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, PinnedProcessor)


def plain_attention(pipe):
    """Step 1: attention as the formula has it, one matrix of scores written to memory; returns `pipe`.

    Scores are [batch * heads, tokens, tokens] in the pipeline's dtype: the memory and time that SDPA saves.
    Raises UserError when the projections are fused or the attention processors are not stock ones (an IP-Adapter's).
    Introduced in notebooks/01_baseline_fp32.
    """
    if is_fused(pipe.unet):
        raise UserError("plain attention needs separate projections, these are fused: load the pipeline again")
    for model in _models(pipe):
        model.set_attn_processor(AttnProcessor())
    return pipe


def sdpa(pipe, backend: str | None = None):
    """Step 3: PyTorch's scaled_dot_product_attention in the UNet, the ControlNet and the VAE; returns `pipe`.

    `backend`: "cudnn", "flash", "efficient" or "math" pins the UNet's kernel; None leaves PyTorch its choice. The VAE
    always keeps that choice: its one head is up to 512 wide, more than the fast kernels take.
    Raises UserError for an unknown backend, or one that cannot run this UNet's heads on this device and dtype, and for
    attention processors that are not stock ones.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html.
    Introduced in notebooks/03_sdpa.
    """
    if backend is not None:
        _check_backend(pipe.unet, backend)
    for model in _models(pipe):
        model.set_attn_processor(_stock_sdpa(model))
    if backend is not None:
        pipe.unet.set_attn_processor(PinnedProcessor(_stock_sdpa(pipe.unet), backend))
    return pipe


def xformers_attention(pipe) -> str | None:
    """Step 3's other library: attention by xformers; returns None, or the reason why SDPA attends instead.

    xformers needs CUDA and a build that matches PyTorch's; where either lacks, `pipe` is left with SDPA.
    Raises UserError after fuse_qkv, whose projections xformers would pass by.
    Source: https://github.com/facebookresearch/xformers. Introduced in notebooks/03_sdpa.
    """
    if is_fused(pipe.unet):
        raise UserError("xformers would use the projections from before fuse_qkv: load the pipeline again without it")
    state = xformers_state()
    if state is not None:
        sdpa(pipe)
        return f"xformers cannot attend here ({state}); SDPA does"
    try:
        pipe.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
        sdpa(pipe)
        return f"xformers cannot attend here ({str(error).strip().splitlines()[0]}); SDPA does"
    return None


def xformers_state() -> str | None:
    """Why xformers' kernels cannot be used here, and the mend, in one line; None where they can.

    To be installed and to import says little: without its CUDA library xformers imports, warns and has no kernels.
    Introduced in notebooks/03_sdpa.
    """
    spec = importlib.util.find_spec("xformers")
    if spec is None:
        return "it is not installed: pip install xformers"
    if not torch.cuda.is_available():
        return "its kernels are for CUDA devices"
    library = next(Path(spec.origin).parent.glob("_C*.so"), None)
    if library is None:
        return "it was built without kernels: install a wheel of it"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return _missing(str(error).splitlines()[0])
    return None


def _missing(error):
    cuda = re.match(r"libcudart\.so\.(\d+)", error)
    if cuda is None:
        return f"its kernels cannot be loaded, {error}"
    return (
        f"its kernels need {cuda[0]}: pip install nvidia-cuda-runtime-cu{cuda[1]}, and put that package's "
        "nvidia/cuda_runtime/lib on LD_LIBRARY_PATH before Python starts"
    )


def attended_by(call: Callable[[], object]) -> list[str]:
    """Run `call()` under PyTorch's profiler; returns whose attention kernels ran, sorted: of BACKENDS, and "ours".

    Told by the kernels' names, which are there in CUDA graphs and compiled code too, where no operator is left to ask;
    on a CPU by the operators. "math" where no fused kernel ran: scores in memory, by a formula or by SDPA's own.
    Raises RuntimeError when the profiler saw nothing of a GPU at work. Introduced in notebooks/03_sdpa.
    """
    return backends_in(profile(call).names)


def backends_in(names: Collection[str]) -> list[str]:
    """Whose attention kernels are among `names` of kernels and operators, as `attended_by` tells it."""
    found = [backend for backend, pattern in FUSED.items() if any(re.search(pattern, name) for name in names)]
    return sorted(found) or ["math"]


def fuse_qkv(pipe):
    """Step 5: one matrix product for query, key and value (key and value in cross-attention); returns `pipe`.

    The projections' weights are copied side by side: [3 * dim, dim] for self-attention, [2 * dim, text] for cross-
    attention. The originals stay in memory beside them, which is what this step costs. Fused projections attend by
    SDPA, whatever attended before. A tiny VAE has no attention to fuse.
    Raises UserError when a LoRA is loaded and not fused (the fused product would silently drop it), when the layers
    are quantised already, or when an IP-Adapter is loaded.
    Source: diffusers' "Accelerate inference" tutorial. Introduced in notebooks/05_fused_qkv.
    """
    if is_fused(pipe.unet):
        return pipe
    if _has_unfused_lora(pipe.unet):
        raise UserError(
            "the LoRA is not fused: call pipe.fuse_lora() and pipe.unload_lora_weights() before fuse_qkv, "
            "or the second alone to draw without it"
        )
    if any(type(part.weight.data) is not torch.Tensor for part in pipe.unet.modules() if isinstance(part, Linear)):
        raise UserError("quantised projections cannot be fused: load the pipeline again and fuse before int8")
    _models(pipe)
    backend = getattr(next(iter(pipe.unet.attn_processors.values())), "backend", None)
    pipe.fuse_qkv_projections(vae=hasattr(pipe.vae, "fuse_qkv_projections"))
    return sdpa(pipe, backend) if backend else pipe


def is_fused(model) -> bool:
    """Whether a UNet's or VAE's attention projections are fused."""
    return any(isinstance(part, Attention) and part.fused_projections for part in model.modules())


def _stock_sdpa(model):
    return FusedAttnProcessor2_0() if is_fused(model) else AttnProcessor2_0()


def _models(pipe):
    """The parts of `pipe` that attend, checked to carry processors that may be replaced."""
    parts = [pipe.unet, pipe.vae, getattr(pipe, "controlnet", None)]
    parts = [net for part in parts for net in getattr(part, "nets", [part])]  # several ControlNets hide in one module
    models = [part for part in parts if hasattr(part, "attn_processors")]
    for model in models:
        for processor in model.attn_processors.values():
            if not isinstance(processor, REPLACEABLE) and "XFormers" not in type(processor).__name__:
                raise UserError(
                    f"{type(processor).__name__} would be lost with a new attention processor: unload the adapter first"
                )
    return models


def _has_unfused_lora(model) -> bool:
    return any(hasattr(part, "lora_A") and part.lora_A and not part.merged for part in model.modules())


def _check_backend(unet, backend):
    if backend not in BACKENDS:
        raise UserError(f"unknown attention backend '{backend}': choose one of {', '.join(BACKENDS)}")
    widths = {part.inner_dim // part.heads for part in unet.modules() if isinstance(part, Attention)}
    for width in sorted(widths):
        probe = torch.zeros(1, 1, 64, width, dtype=unet.dtype, device=unet.device)
        try:
            with sdpa_kernel(BACKENDS[backend]), catch_warnings():
                simplefilter("ignore")  # PyTorch explains each kernel's refusal in a warning of its own
                scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError as error:
            raise UserError(
                f"the {backend} backend cannot attend with heads {width} wide in {unet.dtype} on {unet.device.type}: "
                f"use another of {', '.join(BACKENDS)}, or none"
            ) from error
