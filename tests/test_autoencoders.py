import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline
from tiny import draw, tiny_sdxl

from sdopt.autoencoders import tiny_vae
from sdopt.errors import UserError
from sdopt.pocket import PIPELINE
from sdopt.precision import half_precision


def test_pocket_finds_the_tiny_vae_in_its_own_folder(pocket):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shipped = AutoencoderTiny.from_pretrained(PIPELINE, subfolder="tiny_vae")
    tiny_vae(half_precision(pocket))
    assert pocket.vae.dtype == torch.bfloat16 and not pocket.vae.training
    with torch.no_grad():
        decoded, expected = pocket.vae.float().decode(latents).sample, shipped.decode(latents).sample
    assert (decoded - expected).abs().max() < 0.05  # bfloat16's rounding of the weights
    assert pocket.config["vae"] == ("diffusers", "AutoencoderTiny")


def test_it_decodes_to_the_same_size(pipe):
    before = draw(pipe)
    after = draw(tiny_vae(pipe))
    assert after.shape == before.shape and np.isfinite(after).all()


def test_a_random_pipeline_gets_random_weights_always_the_same(sdxl):
    state = torch.random.get_rng_state()
    first, second = tiny_vae(sdxl).vae, tiny_vae(tiny_sdxl()).vae
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert tiny_vae(sdxl).vae is first  # applied twice it changes nothing


def test_a_picture_can_still_be_encoded(pocket):
    pipe = StableDiffusionImg2ImgPipeline(**pocket.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tiny_vae(pipe, str(PIPELINE / "tiny_vae"))
    start = np.full((1, 64, 64, 3), 0.5, dtype=np.float32)
    assert draw(pipe, image=start, strength=0.5, num_inference_steps=4).shape == (1, 64, 64, 3)


def test_one_that_does_not_fit_is_refused(sdxl):
    full = sdxl.vae
    with pytest.raises(UserError, match="decodes 4 channels 8x up, this pipeline's latents are 4 channels 2x down"):
        tiny_vae(sdxl, str(PIPELINE / "tiny_vae"))
    assert sdxl.vae is full


def test_one_that_cannot_be_loaded_is_refused(pocket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot load the tiny VAE"):
        tiny_vae(pocket, str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("the hub does not answer")

    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", offline)
    with pytest.raises(UserError, match="check the connection"):
        tiny_vae(pocket, "madebyollin/taesd")


def test_a_pipeline_without_a_known_tiny_vae_is_told_so(pocket, tmp_path):
    pocket.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="no tiny VAE is known"):
        tiny_vae(pocket)
