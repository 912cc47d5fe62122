"""The four trainings, each on what the ones before it left in the work folder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from sdopt.pocket.oracle import GRID, HEADS, Oracle
from sdopt.pocket.training import architecture, text
from sdopt.pocket.training.data import WORDINGS, draw_scenes, pictures, render_all, targets, write_captions
from sdopt.pocket.training.loop import fit

CAPTION_DROPOUT = 0.1  # Ho and Salimans 2022, arXiv 2207.12598


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as floats from -1 to 1, channels last."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and MSE of the pictures, L1 of their gradients: a loss without the last lets edges and grain blur."""
    out = out.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(out), gradients(target)))
    return F.l1_loss(out, target) + 2 * F.mse_loss(out, target) + 0.5 * edges


def moments(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the posterior, unscaled."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKL, z: torch.Tensor) -> torch.Tensor:
    return vae.decoder(vae.post_quant_conv(z))


def save_half(model, folder: Path) -> None:
    """Store in fp16, as shipped, so that what is trained next sees the rounded weights."""
    model.half().save_pretrained(folder, max_shard_size="14MB")


def load_frozen(cls, folder: Path, device):
    """A finished part, in fp32, for others to be trained on."""
    return cls.from_pretrained(folder).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def load_vae(work: Path, device) -> AutoencoderKL:
    return load_frozen(AutoencoderKL, work / "vae", device)


def load_tiny(work: Path, device) -> AutoencoderTiny:
    return load_frozen(AutoencoderTiny, work / "tiny_vae", device)


def train(stage: str, modules: dict, draw, loss, args, **more) -> None:
    """Fit `modules` with what the command line says."""
    settings = dict(steps=args.steps, batch=args.batch, lr=args.lr, work=args.work, compiled=args.compile)
    fit(stage, nn.ModuleDict(modules), draw, loss, **(settings | more))


def sampler(images: torch.Tensor, batch: int, truth: dict[str, torch.Tensor] | None = None):
    """Draw batches of uint8 pictures, standard normal latents and, where given, what is true of the pictures."""

    def draw(generator):
        index = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        noise = torch.randn(batch, 4, 32, 32, generator=generator, device=images.device)
        return images[index], noise, *([{k: v[index] for k, v in truth.items()}] if truth else [])

    return draw


def train_vae(args) -> None:
    images = pictures(draw_scenes(args.scenes), args.device, args.work / "pictures.u8")
    vae = architecture.make_vae().to(args.device, memory_format=torch.channels_last)

    def loss(pixels, noise):
        x = to_float(pixels)
        mean, logvar = moments(vae, x)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(decode(vae, mean + torch.exp(0.5 * logvar) * noise), x) + 1e-5 * kl

    train("vae", {"vae": vae}, sampler(images, args.batch), loss, args)
    with torch.no_grad():  # diffusion wants latents of unit deviation
        deviation = torch.cat([moments(vae, to_float(chunk))[0] for chunk in images[:2048].split(64)]).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    save_half(vae, args.work / "vae")


def train_tiny_vae(args) -> None:
    """Distil the decoder: from scaled latents to what the full decoder draws. The encoder learns the scaled latents."""
    images = pictures(draw_scenes(args.scenes), args.device, args.work / "pictures.u8")
    vae = load_vae(args.work, args.device)
    scale = vae.config.scaling_factor
    tiny = architecture.make_tiny_vae().to(args.device, memory_format=torch.channels_last)

    def loss(pixels, noise):
        x = to_float(pixels)
        with torch.no_grad():
            mean = moments(vae, x)[0]
            latents = mean + 0.02 / scale * noise  # pocket's own latents are never quite an encoder's
            target = decode(vae, latents).float()
        return reconstruction_loss(tiny.decoder(latents * scale), target) + F.mse_loss(
            tiny.encoder(x).float(), mean * scale
        )

    train("tiny-vae", {"tiny": tiny}, sampler(images, args.batch), loss, args)
    save_half(tiny, args.work / "tiny_vae")


def train_oracle(args) -> None:
    """A quarter of every batch is drawn again by the VAE and a quarter by the tiny VAE, as pocket's pictures are."""
    scenes = draw_scenes(args.scenes)
    images = pictures(scenes, args.device, args.work / "pictures.u8")
    truth = {k: v.to(args.device) for k, v in targets(scenes).items()}
    vae, tiny = load_vae(args.work, args.device), load_tiny(args.work, args.device)
    oracle = Oracle().to(args.device, memory_format=torch.channels_last)
    quarter = args.batch // 4

    def loss(pixels, noise, wanted):
        x = to_float(pixels)
        with torch.no_grad():
            latents = moments(vae, x[: 2 * quarter])[0] + 0.1 / vae.config.scaling_factor * noise[: 2 * quarter]
            seen = [
                decode(vae, latents[:quarter]).float(),
                tiny.decoder(latents[quarter:] * vae.config.scaling_factor).float(),
                x[2 * quarter :],
            ]
            grain = F.interpolate(noise[:, :3], scale_factor=8.0) * noise[:, 3:, :1, :1].abs() * 0.02
            x = torch.cat(seen).clamp(-1, 1) + grain
        out = {k: v.float() for k, v in oracle(x).items()}
        cell, there = wanted["cell"].clamp(min=0), wanted["cell"] >= 0
        spots = torch.zeros(len(x), GRID * GRID, device=x.device).scatter_reduce(1, cell, there.float(), "amax")
        logits = out["heat"].flatten(1)
        # a neighbour of a centre is not quite wrong: its penalty is lowered by how near it is, as in CenterNet
        near = F.conv2d(spots.view(-1, 1, GRID, GRID), kernel, padding=2).flatten(1).clamp(max=1)
        p = logits.sigmoid()
        heat = -spots * (1 - p) ** 2 * F.logsigmoid(logits) - (1 - spots) * (1 - near) ** 4 * p**2 * F.logsigmoid(
            -logits
        )
        total = heat.sum() / there.sum()
        for head, width in HEADS.items():
            if head == "heat":
                continue
            at = out[head].flatten(2).gather(2, cell[:, None].expand(-1, width, -1)).transpose(1, 2)[there]
            total = total + (
                2 * F.smooth_l1_loss(at, wanted["place"][there], beta=0.1)
                if head == "place"
                else F.cross_entropy(at, wanted[head][there])
            )
        return total + F.cross_entropy(out["sky"], wanted["sky"]) + F.cross_entropy(out["ground"], wanted["ground"])

    ticks = torch.arange(-2, 3, device=args.device).float()
    kernel = torch.exp(-(ticks[:, None] ** 2 + ticks**2) / 2)[None, None]
    train("oracle", {"oracle": oracle}, sampler(images, args.batch, truth), loss, args, compiled=False)
    save_file({k: v.half().contiguous() for k, v in oracle.state_dict().items()}, args.work / "oracle.safetensors")


def latents_and_captions(args, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents fp16 [N, 4, 32, 32] and token ids [N, WORDINGS, 48] of scenes without a held-out pair; kept in a file."""
    cache = args.work / "latents.safetensors"
    if not cache.exists():
        vae = load_vae(args.work, args.device)
        scenes = draw_scenes(args.scenes, held_out=False)
        texts = [t for row in write_captions(scenes) for t in row]
        ids = tokenizer(
            texts, padding="max_length", max_length=architecture.TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        encode = torch.compile(moments, dynamic=False) if args.compile else moments
        with torch.no_grad(), torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16):
            rows = [
                (encode(vae, to_float(chunk))[0] * vae.config.scaling_factor).half()
                for chunk in render_all(scenes, args.device)
            ]
        save_file(
            {
                "latents": torch.cat(rows).contiguous().cpu(),
                "ids": ids.view(-1, WORDINGS, architecture.TOKENS).to(torch.int16),
            },
            cache,
        )
    saved = load_file(cache, device=args.device)
    return saved["latents"], saved["ids"]


def train_text_to_image(args) -> None:
    """The text encoder first learns to say its caption's facts, then it and the UNet learn to draw them."""
    tokenizer = architecture.make_tokenizer(args.work / "tokenizer")
    latents, ids = latents_and_captions(args, tokenizer)
    encoder = architecture.make_text_encoder(tokenizer).to(args.device)
    text.learn_facts(encoder, tokenizer, ids, args)
    unet = architecture.make_unet().to(args.device, memory_format=torch.channels_last)
    signal = architecture.make_scheduler().alphas_cumprod.to(args.device)
    empty = tokenizer("", padding="max_length", max_length=architecture.TOKENS, return_tensors="pt").input_ids.to(
        args.device
    )

    def draw(generator):
        some = dict(generator=generator, device=latents.device)
        index = torch.randint(len(latents), (args.batch,), **some)
        wording = torch.randint(WORDINGS, (args.batch,), **some)
        words = ids[index, wording].long()
        words = torch.where(torch.rand(args.batch, 1, **some) < CAPTION_DROPOUT, empty, words)
        z = latents[index].float()
        return z, words, torch.randn(z.shape, **some), torch.randint(len(signal), (args.batch,), **some)

    def loss(z, words, noise, t):
        a = signal[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        velocity = a.sqrt() * noise - (1 - a).sqrt() * z  # Salimans and Ho 2022, arXiv 2202.00512
        # every noise level counts alike: what a picture holds, and where, is settled at the noisiest ones
        return F.mse_loss(unet(noisy, t, encoder(words).last_hidden_state, return_dict=False)[0].float(), velocity)

    modules = {"unet": unet, "text_encoder": encoder}
    train("text-to-image", modules, draw, loss, args, ema=0.9995, minutes=args.minutes)
    assemble(args, tokenizer, encoder, unet)


def assemble(args, tokenizer: CLIPTokenizer, encoder, unet: UNet2DConditionModel) -> None:
    """Put the trained parts together as the folders that sdopt ships."""
    args.out.mkdir(parents=True, exist_ok=True)
    architecture.save_pipeline(
        args.out / "pipeline",
        load_vae(args.work, "cpu"),
        load_tiny(args.work, "cpu"),
        tokenizer,
        encoder.cpu(),
        unet.cpu(),
    )
    save_file(load_file(args.work / "oracle.safetensors"), args.out / "oracle.safetensors")
    tqdm.write(f"wrote {args.out}")
