"""pocket's parts, untrained: stock diffusers and transformers modules, sized for two CPU cores."""

import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdopt.pocket.captions import wording
from sdopt.pocket.scenes import sample

TOKENS = 48
TEXT_WIDTH = 192


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make every word of pocket's captions one token; bytes cover the rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # a frequency of 1 and a large vocabulary: merging goes on until every word is whole
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((wording(sample(i), "train") for i in range(4000)), trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = (
        alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    )
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges=merges, model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128), layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def make_tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(3, 3, 3, 1),
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4), cross_attention_dim=TEXT_WIDTH,  # of SD 1.x-style UNets attention_head_dim counts heads
    )  # fmt: skip


def make_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def save_pipeline(folder: Path, vae, tiny_vae, tokenizer, text_encoder, unet) -> None:
    """Write the folder that `DiffusionPipeline.from_pretrained` loads, and `tiny_vae` beside.

    fp16 but for the text encoder: transformers loads what it finds, and fp16 text beside an fp32 UNet would not run.
    """
    pipe = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.float(), tokenizer=tokenizer, unet=unet.half(), scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder, max_shard_size="14MB")
    tiny_vae.half().save_pretrained(folder / "tiny_vae")
