"""The three models of the course, as data, and one function that loads any of them as a stock diffusers pipeline."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdopt.errors import UserError, first_line
from sdopt.pocket import PIPELINE
from sdopt.precision import compute_wide

CONFIGS = Path(__file__).parent / "configs"
CLASSES = {
    cls.__name__: cls
    for cls in (
        *(AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, EulerAncestralDiscreteScheduler),
        *(EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel),
    )
}
SCHEDULERS = {"euler": EulerDiscreteScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}


@dataclass(frozen=True)
class Model:
    """What every row of a model shares: where its weights are, and the settings of one picture."""

    name: str
    title: str
    weights: str  # where the weights come from when nothing else is said: "shipped" or "hub"
    height: int
    width: int
    steps: int
    guidance_scale: float
    scheduler: str
    prompt: str
    pipeline: type = StableDiffusionPipeline
    hub_id: str | None = None
    revision: str | None = None
    extras: dict = field(default_factory=dict)  # what the pipeline's constructor needs beside its parts


ASTRONAUT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

MODELS = {
    model.name: model
    for model in (
        Model(
            name="pocket",
            title="pocket",
            weights="shipped",
            height=256,
            width=256,
            steps=30,
            guidance_scale=3.0,
            scheduler="euler",
            prompt="a small shiny red sphere to the left of a large matte blue cube, at sunset",
            extras=NO_CHECKER,
        ),
        Model(
            name="sd15",
            title="Stable Diffusion 1.5",
            weights="hub",
            height=512,
            width=512,
            steps=30,
            guidance_scale=7.5,
            scheduler="euler_ancestral",
            prompt=ASTRONAUT,
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            extras=NO_CHECKER,
        ),
        Model(
            name="sdxl",
            title="Stable Diffusion XL",
            weights="hub",
            height=1024,
            width=1024,
            steps=30,
            guidance_scale=5.0,
            scheduler="euler",
            prompt=ASTRONAUT,
            pipeline=StableDiffusionXLPipeline,
            hub_id="stabilityai/stable-diffusion-xl-base-1.0",
            revision="462165984030d82259a11f4367a4eed129e94a7b",
            extras={"add_watermarker": False},
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """The model this machine should run, and why, in words to print."""

    name: str
    reason: str


def model(name):
    """The `Model` called `name`; raises UserError for a name that is none of `MODELS`."""
    if name not in MODELS:
        raise UserError(f"unknown model '{name}': choose one of {', '.join(MODELS)}")
    return MODELS[name]


def check_size(height, width):
    """Raise UserError unless `height` and `width` (pixels) suit a VAE that shrinks by 8."""
    for side, pixels in (("height", height), ("width", width)):
        if pixels < 8 or pixels % 8:
            nearest = max(8, round(pixels / 8) * 8)
            raise UserError(f"{side} {pixels} is not a positive multiple of 8: use {nearest}")


def check_device(device):
    """Raise UserError unless `device` is "cpu", or "cuda" where there is one."""
    if str(device) not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{device}': use cpu or cuda (CUDA_VISIBLE_DEVICES=1 picks the second GPU)")
    if str(device) == "cuda" and not torch.cuda.is_available():
        raise UserError("cuda was asked for but this PyTorch sees no CUDA device: use --device cpu")


def load(name, weights=None, device="cpu"):
    """Load a model as the stock diffusers pipeline it is: fp32, eager, its scheduler set as its settings say.

    `weights`: None takes the model's own (pocket ships with the package, sd15 and sdxl come from the hub at a pinned
    revision); "hub"; "random" builds the full sd15 or sdxl architecture with seeded random weights, whose latency and
    memory are the real model's and whose picture is noise; anything else is the path of a local diffusers folder.
    Returns a StableDiffusionPipeline or StableDiffusionXLPipeline on `device`, parameters float32.
    Raises UserError: unknown model, absent device, unreachable hub, a folder that holds no pipeline, damaged weights.
    Introduced in notebooks/00_measure_first.
    """
    chosen = model(name)
    check_device(device)
    weights = weights or chosen.weights
    if weights == "random":
        pipe = _random(chosen, device)
    elif weights == "hub":
        pipe = _from_hub(chosen)
    else:
        pipe = _from_folder(chosen, PIPELINE if weights == chosen.weights else Path(weights))
    pipe.scheduler = SCHEDULERS[chosen.scheduler].from_config(pipe.scheduler.config)
    compute_wide(device)
    return pipe.to(device)


def pick(device=None, name=None):
    """Choose the model for this machine, with the reason: `Choice(name, reason)`. Needs no network.

    `device` "cpu" leaves a GPU out of account. `name`, where given, is the choice; UserError for an unknown one.

    The largest that runs well: sdxl on a GPU with 24 GB or more and compute capability 8.0 or later, sd15 on any
    other GPU, both only with a hub that answers (or a download already there); pocket everywhere else.
    """
    if name is not None:
        return Choice(model(name).name, "asked for by name")
    if device == "cpu" or not torch.cuda.is_available():
        return Choice("pocket", "no CUDA device: pocket ships with the package and runs on a CPU")
    gpu = torch.cuda.get_device_properties(0)
    gigabytes, capability = gpu.total_memory / 1e9, (gpu.major, gpu.minor)
    seen = f"{gpu.name}, {gigabytes:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
    # Cards sold as 24 GB report a little less or more, by how they count.
    name = "sdxl" if gigabytes >= 23.5 and capability >= (8, 0) else "sd15"
    if not _available(MODELS[name]):
        return Choice("pocket", f"{seen}, but the hub does not answer: pocket ships with the package")
    half = "" if capability >= (8, 0) else "; fp16 stands in for bf16, which this GPU lacks"
    return Choice(name, seen + half)


def start_at_step_zero(pipe):
    """Spare the scheduler its one wait for the GPU, at the first step of a picture; returns `pipe`.

    Euler and DPM++ count steps themselves and keep their sigmas on the CPU: only the first step looks its number up on
    the GPU. It is zero where the step's timestep lies at the head of all timesteps, which is known without reading it;
    who starts midway by hand waits as ever. Introduced in notebooks/04_compile.
    """
    scheduler = pipe.scheduler
    if "_init_step_index" not in vars(scheduler) and hasattr(scheduler, "_init_step_index"):
        scheduler._init_step_index = MethodType(_init_step_index, scheduler)  # of a copy it becomes the copy's own
    return pipe


def _init_step_index(scheduler, timestep):
    first = isinstance(timestep, torch.Tensor) and timestep.numel() == 1
    if first and scheduler.begin_index is None and timestep.data_ptr() == scheduler.timesteps.data_ptr():
        scheduler._step_index = 0
    else:
        type(scheduler)._init_step_index(scheduler, timestep)


def _available(chosen):
    if isinstance(try_to_load_from_cache(chosen.hub_id, "model_index.json", revision=chosen.revision), str):
        return True
    try:
        HfApi().model_info(chosen.hub_id, revision=chosen.revision, timeout=5)
    except Exception:  # whatever the reason, the weights cannot be had
        return False
    return True


def download(name):
    """Fetch what `load(name, "hub")` needs, with the hub's progress bars; raises UserError as that does."""
    chosen = model(name)
    return _with_hub(
        chosen, lambda: chosen.pipeline.download(chosen.hub_id, revision=chosen.revision, use_safetensors=True)
    )


def _from_hub(chosen):
    return _with_hub(chosen, lambda: _from_pretrained(chosen, chosen.hub_id, revision=chosen.revision))


def _with_hub(chosen, call):
    if chosen.hub_id is None:
        raise UserError(f"{chosen.name} is not on the hub, it ships with the package: leave --weights out")
    try:
        return call()
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        raise UserError(
            f"cannot get {chosen.hub_id} from the hub ({first_line(error)}): run `sdopt run --model pocket`, "
            f"or time the bare architecture with `sdopt run --model {chosen.name} --weights random`"
        ) from error


def _from_folder(chosen, folder):
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers pipeline (it has no model_index.json): give the folder that has one")
    try:
        kind = json.loads(index.read_text())["_class_name"]
        if kind != chosen.pipeline.__name__:
            raise UserError(f"{folder} holds a {kind}, {chosen.name} is a {chosen.pipeline.__name__}: give another folder")
        return _with_words(_from_pretrained(chosen, str(folder), local_files_only=True))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load {folder} ({first_line(error)}): copy the folder again or repair it") from error


def _with_words(pipe):
    """`pipe`; ValueError for a tokenizer without its file: it loads all the same, and every word is unknown to it."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None and len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError(f"its {name} knows no words")
    return pipe


def _from_pretrained(chosen, source, **where):
    return chosen.pipeline.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **where, **chosen.extras)


def _random(chosen, device):
    folder = CONFIGS / chosen.name
    if not folder.is_dir():
        raise UserError(f"{chosen.name} has its own weights, random ones would say nothing: leave --weights out")
    configs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    scheduler = configs.pop("scheduler")
    parts = {"scheduler": CLASSES[scheduler.pop("_class_name")].from_config(scheduler)}
    # Built on the device itself: on a GPU that takes seconds, and no second copy of the weights passes through memory.
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts |= {part: _network(config) for part, config in configs.items()}
    parts["tokenizer"] = _tokenizer(pad_token="<|endoftext|>")
    if "text_encoder_2" in parts:
        parts["tokenizer_2"] = _tokenizer(pad_token="!")
    return chosen.pipeline(**parts, **chosen.extras)


def _network(config):
    cls = CLASSES[config.pop("_class_name")]
    network = cls.from_config(config) if cls in (UNet2DConditionModel, AutoencoderKL) else cls(CLIPTextConfig(**config))
    return network.eval()


def _tokenizer(pad_token):
    """CLIP's tokenizer without its merges: one token a byte, the special ids where CLIP has them, 77 tokens a prompt."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(symbols + [symbol + "</w>" for symbol in symbols])}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad_token)
