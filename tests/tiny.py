"""A random SDXL pipeline small enough for a test, and how the tests draw with any pipeline."""

from contextlib import contextmanager

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdopt import precision
from sdopt.models import MODELS


def computes_wide():
    """Whether layers of bfloat16 compute in float32 on this machine's CPU: what is counted and timed there differs."""
    precision.compute_wide("cpu")
    return torch.bfloat16 in precision.WIDE


def tiny_sdxl():
    """SDXL's parts in miniature, seeded: UNet of 2 levels, 2 text encoders of 32, images 2x the latents' size."""
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=64,
        )
        text = CLIPTextModel(_text_config(tokenizer))
        text_2 = CLIPTextModelWithProjection(_text_config(tokenizer))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        text_encoder_2=text_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )


def _tokenizer():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


def _text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def draw(pipe, prompt="a red sphere", seeds=(0,), **call):
    """Pictures as floats in [0, 1], [n, 64, 64, 3]; one seed a picture, drawn on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {} if "image" in call else {"height": 64, "width": 64}
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0} | size | call
    return pipe(prompt, generator=generators, output_type="np", **settings).images


def native(pipe):
    """Call settings at which a picture means something: pocket's own size and guidance; none for random weights."""
    if pipe.vae_scale_factor == 8:
        return {
            "height": 256,
            "width": 256,
            "num_inference_steps": 8,
            "guidance_scale": MODELS["pocket"].guidance_scale,
        }
    return {}


def psnr(a, b):
    """In dB, of pictures in [0, 1]."""
    return -10 * np.log10(np.square(a - b).mean())


@contextmanager
def unet_batches(pipe):
    """Collects the batch size of every UNet call made within."""
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    yield batches
    hook.remove()
