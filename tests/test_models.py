import json
import shutil

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from sdopt import models
from sdopt.errors import UserError
from sdopt.pocket import PIPELINE

KNOWN = {  # published parameter counts, in millions
    "sd15": {"unet": 859.5, "vae": 83.65, "text_encoder": 123.06},
    "sdxl": {"unet": 2567.5, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66},
}


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def copy_of_pocket(folder):
    return shutil.copytree(PIPELINE, folder / "pocket")


def refused(*args, **kwargs):
    with pytest.raises(UserError) as told:
        models.load(*args, **kwargs)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_pocket_loads_in_fp32_on_the_cpu_with_its_scheduler():
    pipe = models.load("pocket")
    assert type(pipe) is StableDiffusionPipeline
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_random_weights_build_the_full_architecture(name, monkeypatch):
    monkeypatch.setattr(models.MODELS[name].pipeline, "to", lambda pipe, device: pipe)  # meta tensors cannot move
    monkeypatch.setattr(models, "check_device", lambda device: None)
    pipe = models.load(name, "random", device="meta")
    for part, count in KNOWN[name].items():
        assert millions(getattr(pipe, part)) == pytest.approx(count, rel=1e-4), part
    assert isinstance(pipe.scheduler, EulerAncestralDiscreteScheduler if name == "sd15" else EulerDiscreteScheduler)
    ids = pipe.tokenizer("Astronaut in a jungle", padding="max_length", max_length=77).input_ids
    assert (ids[0], ids[-1], len(ids)) == (49406, 49407, 77)


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(tmp_path, monkeypatch):
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    (tmp_path / "pocket").mkdir()
    for part, cls in classes.items():
        config = json.loads((PIPELINE / part / "config.json").read_text())
        (tmp_path / "pocket" / f"{part}.json").write_text(json.dumps(config | {"_class_name": cls}))
    shutil.copy(models.CONFIGS / "sdxl" / "scheduler.json", tmp_path / "pocket")
    monkeypatch.setattr(models, "CONFIGS", tmp_path)
    before = torch.random.get_rng_state()
    one, two = (models.load("pocket", "random") for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for part in classes:
        weights, again = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_local_folder_is_loaded(tmp_path):
    pipe = models.load("pocket", str(copy_of_pocket(tmp_path)))
    assert pipe("a red cube", num_inference_steps=1, height=64, width=64, output_type="np").images.shape == (
        1,
        64,
        64,
        3,
    )


def test_an_unknown_model_is_refused():
    assert refused("sd3") == "unknown model 'sd3': choose one of pocket, sd15, sdxl"


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    assert "is no diffusers pipeline" in refused("pocket", str(tmp_path))
    assert "is no diffusers pipeline" in refused("pocket", str(tmp_path / "absent"))


def test_a_pipeline_of_another_model_is_refused():
    assert "sdxl is a StableDiffusionXLPipeline" in refused("sdxl", str(PIPELINE))


def test_a_truncated_weights_file_is_refused(tmp_path):
    folder = copy_of_pocket(tmp_path)
    file = sorted((folder / "unet").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1000])
    assert "copy the folder again" in refused("pocket", str(folder))


@pytest.mark.parametrize("lost", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_tokenizer_without_its_words_is_refused(tmp_path, lost):
    """transformers makes one of two tokens, to which every word is unknown."""
    folder = copy_of_pocket(tmp_path)
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "knows no words): copy the folder again" in refused("pocket", str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_another_shape_are_refused(tmp_path, part):
    folder = copy_of_pocket(tmp_path)
    config = json.loads((folder / part / "config.json").read_text())
    key = "intermediate_size" if part == "text_encoder" else "block_out_channels"
    config[key] = 2 * config[key] if part == "text_encoder" else [2 * c for c in config[key]]
    (folder / part / "config.json").write_text(json.dumps(config))
    assert "copy the folder again" in refused("pocket", str(folder))


def test_a_model_index_that_is_not_json_is_refused(tmp_path):
    folder = copy_of_pocket(tmp_path)
    (folder / "model_index.json").write_text("{")
    assert "copy the folder again" in refused("pocket", str(folder))


def test_an_unreachable_hub_says_what_to_run_instead(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(models.StableDiffusionXLPipeline, "from_pretrained", unreachable)
    said = refused("sdxl")
    assert "sdopt run --model pocket" in said
    assert "sdopt run --model sdxl --weights random" in said


def test_pocket_has_neither_hub_nor_random_weights():
    assert "leave --weights out" in refused("pocket", "random")
    assert "leave --weights out" in refused("pocket", "hub")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none_is_refused():
    assert "--device cpu" in refused("pocket", device="cuda")


def test_an_unknown_device_is_refused():
    assert "unknown device 'tpu'" in refused("pocket", device="tpu")


@pytest.mark.parametrize("size", [(250, 256), (256, 7), (0, 256), (-8, 256)])
def test_a_size_that_is_no_multiple_of_8_is_refused(size):
    with pytest.raises(UserError, match="multiple of 8: use"):
        models.check_size(*size)


@pytest.mark.parametrize(
    ("gigabytes", "capability", "hub", "name", "why"),
    [
        (143, (9, 0), True, "sdxl", "143 GB"),
        (25.3, (8, 9), True, "sdxl", "8.9"),
        (16, (8, 9), True, "sd15", "16 GB"),
        (34, (7, 0), True, "sd15", "fp16"),
        (143, (9, 0), False, "pocket", "hub does not answer"),
    ],
)
def test_pick_takes_the_largest_model_that_runs_well(monkeypatch, gigabytes, capability, hub, name, why):
    class Gpu:
        name = "Some GPU"
        total_memory = gigabytes * 1e9
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(models, "_available", lambda chosen: hub)
    choice = models.pick()
    assert choice.name == name
    assert why in choice.reason


def test_pick_without_a_gpu_is_pocket(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick().name == "pocket"


@pytest.mark.gpu
def test_random_sd15_draws_finite_noise_on_a_gpu():
    pipe = models.load("sd15", "random", "cuda")
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 512, 512, 3)
    assert (image == image).all()
