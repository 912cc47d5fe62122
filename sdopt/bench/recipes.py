"""What the path has no step for: others' recipes, to measure the path beside them."""

import os
import tempfile
from functools import partial

import torch

from sdopt import attention, compilation, engine, precision, quantization
from sdopt.errors import UserError

# The flags of diffusers' tutorial, all of them but use_mixed_mm, which Inductor ignores today.
TUTORIAL_FLAGS = compilation.CUDA_OPTIONS | compilation.SEARCH


def stock_compile(mode):
    """torch.compile as its documentation has it: UNet and VAE decoder, fullgraph, `mode`, channels_last; no other flag."""
    return partial(_stock_compile, mode)


def _stock_compile(mode, pipe):
    compilation.channels_last(pipe)
    compilation.start_at_step_zero(pipe)
    compilation.quieten()
    options = compilation.mode_options(mode)  # as mode=mode, which takes no options beside it
    pipe.unet.compile(fullgraph=True, options=options)
    pipe.vae.decoder.compile(fullgraph=True, options=options)
    return pipe


def regional(pipe):
    """diffusers' regional compilation: the UNet's transformer blocks, one graph for all that are alike; no other flag.

    Source: https://huggingface.co/docs/diffusers/optimization/fp16#regional-compilation.
    """
    compilation.channels_last(pipe)
    compilation.start_at_step_zero(pipe)
    pipe.unet.compile_repeated_blocks(fullgraph=True)
    return pipe


def tutorial(pipe):
    """diffusers' "Accelerate inference" tutorial, from fused projections on, to a pipeline in bf16 with SDPA.

    fuse_qkv_projections, channels_last, int8 by its filter, then max-autotune of UNet and VAE decoder with its flags.
    Source: https://huggingface.co/docs/diffusers/tutorials/fast_diffusion.
    """
    pipe.fuse_qkv_projections()
    compilation.channels_last(pipe)
    quantization.tutorial_int8(pipe)
    compilation.start_at_step_zero(pipe)  # "Remove GPU sync after compilation"
    options = compilation.mode_options("max-autotune") | TUTORIAL_FLAGS
    pipe.unet.compile(fullgraph=True, options=options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, options=options)
    return pipe


def hpml(pipe):
    """The HPML project's engineering: TF32 for what is in fp32, channels_last, max-autotune of UNet and VAE decoder."""
    precision.set_tf32("everywhere")
    return _stock_compile("max-autotune", pipe)


def on_engine(pipe, **settings):
    """Our engine, its kernels compiled in this process: nothing on disk makes the first call shorter than it is."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="sdopt-")
    return engine.prepare(pipe, **settings)


def in_fp8(filter="measured", scales="row"):
    """Our engine in fp8."""
    return partial(on_engine, precision="fp8", filter=filter, scales=scales)


def torchao_fp8(pipe):
    """torchao's fp8 to a pipeline in bf16 with SDPA, compiled with CUDA graphs: fused projections, channels_last."""
    attention.fuse_qkv(pipe)
    quantization.torchao_fp8(pipe)
    return _stock_compile("reduce-overhead", pipe)


def many_at_once(pipe, **settings):
    """Our engine for large batches, whose pictures are decoded one by one: together they would not fit into memory."""
    pipe.vae.enable_slicing()
    return on_engine(pipe, **settings)


def xformers(pipe):
    """Attention by xformers in the UNet. Raises UserError with the reason where it cannot attend."""
    reason = attention.xformers_attention(pipe)
    if reason:
        raise UserError(reason)
    return pipe


def int8_every_layer(pipe):
    """int8 wherever a product of whole numbers can be computed at all, then compiled as the path does."""
    quantization.int8(pipe, every=True)
    compilation.compile_pipeline(compilation.channels_last(pipe))
    return pipe
