"""Step 7: a decoder distilled to a few dozen convolutions."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from sdopt.errors import UserError

# By the width of the text the UNet attends to. No revision of these two is on record to be pinned: main is taken.
HUB = {768: "madebyollin/taesd", 2048: "madebyollin/taesdxl"}


def tiny_vae(pipe, source: str | None = None):
    """Step 7: decode latents with an AutoencoderTiny in place of the full VAE; returns `pipe`.

    `source`: a diffusers folder or hub name, or "random" for seeded random weights (their time is real, their picture
    noise). None finds it: `tiny_vae/` in the pipeline's own folder; "random" for a pipeline that was never loaded and
    so is random itself; TAESD or TAESDXL from the hub for Stable Diffusion 1.x and XL. It takes the full VAE's dtype
    and device, and brings an encoder of its own, for image-to-image and inpainting.
    Raises UserError when none is known for this pipeline, it cannot be loaded, or it does not fit the latents.
    Source: https://github.com/madebyollin/taesd. Introduced in notebooks/07_tiny_vae.
    """
    if isinstance(pipe.vae, AutoencoderTiny):
        return pipe
    source = source or _find(pipe)
    tiny = _random(pipe.vae.config) if source == "random" else _load(source)
    shrink = 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    if (shrink, tiny.config.latent_channels) != (pipe.vae_scale_factor, pipe.vae.config.latent_channels):
        raise UserError(
            f"{source} decodes {tiny.config.latent_channels} channels {shrink}x up, this pipeline's latents are "
            f"{pipe.vae.config.latent_channels} channels {pipe.vae_scale_factor}x down: give a tiny VAE made for it"
        )
    pipe.vae = tiny.to(pipe.vae.device, pipe.vae.dtype).eval()
    return pipe


def _find(pipe):
    folder = Path(pipe.config.get("_name_or_path") or "") / "tiny_vae"
    if (folder / "config.json").is_file():
        return str(folder)
    if not (pipe.config.get("_name_or_path") or pipe.unet.config.get("_name_or_path")):
        return "random"
    width = pipe.unet.config.cross_attention_dim
    if width not in HUB:
        raise UserError("no tiny VAE is known for this pipeline: give the folder of one")
    return HUB[width]


def _load(source):
    try:
        return AutoencoderTiny.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # the hub's client fails in a dozen ways, and the mend is the same
        raise UserError(
            f"cannot load the tiny VAE {source}: check the connection, or give a folder that holds one"
        ) from error


def _random(full):
    """TAESD's architecture, with as many stages as the full VAE has."""
    stages = len(full.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=(64,) * stages,
            decoder_block_out_channels=(64,) * stages,
            num_encoder_blocks=(1,) + (3,) * (stages - 1),
            num_decoder_blocks=(3,) * (stages - 1) + (1,),
            latent_channels=full.latent_channels,
        )
