"""The page on troubleshooting: its messages are what is printed, as far as a CPU can be made to print them."""

import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

from sdopt import attention, compilation, models, path
from sdopt.pocket import PIPELINE
from sdopt.report import ROOT

FILE = ROOT / "notebooks" / "TROUBLESHOOTING.md"
PAGE = FILE.read_text()
PRINTED = "\n".join(re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def said(call):
    """The first line of what `call()` raises, as Python prints it, without what is true of this machine alone."""
    with pytest.raises(Exception) as caught:
        call()
    kind, line = type(caught.value), str(caught.value).strip().splitlines()[0]
    module = "" if kind.__module__ in ("builtins", "sdopt.errors") else f"{kind.__module__}."
    return re.sub(r" \(/.*", "", f"{module}{kind.__name__}: {line}")


def fuse_after_int8(pipe):
    path.prepare(pipe, ["int8"])
    pipe.fuse_qkv_projections()


def late_fusion(pipe):
    path.prepare(pipe, ["int8"])
    path.prepare(pipe, ["fused_qkv"])


def lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k"]))
    return pipe


def two_prompts(pipe):
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    pipe(["a", "b"], num_inference_steps=3, height=64, width=64, callback_on_step_end=cut)


def two_dtypes(pipe):
    prompt = torch.ones(1, 77, pipe.unet.config.cross_attention_dim).bfloat16()
    pipe.unet.to(torch.bfloat16)(torch.ones(1, 4, 8, 8), 1, prompt)


def traced(function):
    return lambda pipe: torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))


def branch(x):
    return x if x.isnan().any() else x + 1


def shows(x):
    print(x.shape)
    return x


def from_torchao(name):
    exec(f"from torchao.quantization import {name}", {})


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.enable_vae_slicing(),
        lambda pipe: pipe.unet.enable_cache(None),
        lambda pipe: from_torchao("apply_dynamic_quant"),
        lambda pipe: from_torchao("autoquant"),
        lambda pipe: torch.compile(shows, mode="max-autotune", options={"epilogue_fusion": False}),
        traced(branch),
        traced(shows),
        late_fusion,
        two_prompts,
        two_dtypes,
        lambda pipe: attention.fuse_qkv(lora(pipe)),
        lambda pipe: lora(pipe).enable_lora_hotswap(target_rank=8),
        lambda pipe: quantize_(torch.nn.Linear(64, 64).bfloat16(), Float8DynamicActivationFloat8WeightConfig()),
    ],
)
def test_a_message_stands_as_it_is_printed(call, pocket, fresh_compiler):
    with torch.no_grad():
        assert said(lambda: call(pocket)) in PRINTED.splitlines()


def test_longer_messages_stand_with_their_beginning(pocket, monkeypatch):
    with torch.no_grad():
        assert said(lambda: fuse_after_int8(pocket)).partition(", types=")[0] in PRINTED.splitlines()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert said(lambda: compilation.compile_pipeline(pocket)) in PRINTED
    xformers, library = (pytest.importorskip(f"xformers.{name}") for name in ("ops", "_cpp_lib"))
    source = Path(library.__file__).read_text()
    assert "xFormers can't load C++/CUDA extensions. " in source and "xFormers was built for:\n" in source
    q = torch.ones(1, 4, 2, 8)
    assert said(lambda: xformers.memory_efficient_attention(q, q, q)) in PRINTED.splitlines()


def test_one_shape_too_many_is_told_once_and_then_nothing_is_compiled(fresh_compiler, caplog):
    def sizes(fullgraph):
        grow = torch.compile(lambda x: x + 1, backend="eager", dynamic=False, fullgraph=fullgraph)
        for n in range(2, 12):
            grow(torch.ones(n))

    with caplog.at_level("WARNING"):
        sizes(False)
    (told,) = [record.getMessage() for record in caplog.records if "recompile_limit" in record.getMessage()]
    assert told.splitlines()[0].strip() in PRINTED
    assert re.search(r"last reason: .*", told)[0] in PRINTED
    torch._dynamo.reset()
    assert said(lambda: sizes(True)) in PRINTED


def test_warnings_stand_as_they_are_printed():
    black = torch.full((1, 3, 8, 8), float("nan"))
    with pytest.warns(RuntimeWarning) as cast:
        (picture,) = VaeImageProcessor().postprocess(black, output_type="pil")
    assert f"RuntimeWarning: {cast[0].message}" in PRINTED and picture.getextrema() == ((0, 0),) * 3
    with pytest.warns(FutureWarning, match="torch_dtype") as renamed:
        diffusers.DiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32, **models.NO_CHECKER)
    assert any(f"FutureWarning: {warning.message}" in PRINTED for warning in renamed)


@pytest.mark.parametrize(
    ("package", "file", "words"),
    [
        (torch, "_inductor/cudagraph_trees.py", "accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run."),
        (torch, "_inductor/cudagraph_utils.py", "skipping cudagraphs due to "),
        (torch, "_inductor/select_algorithm.py", "AUTOTUNE "),
        (torch, "_inductor/exc.py", "No working C++ compiler found in "),
        (
            diffusers,
            "pipelines/stable_diffusion/safety_checker.py",
            "Potential NSFW content was detected in one or more images. A black image will be returned instead.",
        ),
    ],
)
def test_what_a_cpu_cannot_print_stands_in_the_source(package, file, words):
    assert words in (Path(package.__file__).parent / file).read_text() and words in PAGE


def test_silent_no_ops_are_silent(pocket, tmp_path):
    pocket.unet.set_attention_backend("native")
    assert not any(hasattr(processor, "_attention_backend") for processor in pocket.unet.attn_processors.values())
    vocab = pocket.tokenizer.get_vocab()
    (tmp_path / "vocab.json").write_text(str(vocab).replace("'", '"'))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merges_file": str(tmp_path / "merges.txt")}
    tokenizer = transformers.CLIPTokenizer(**files)
    assert len(set(tokenizer("red cube").input_ids[1:])) == 1, "every word is the unknown one"


def test_links_lead_somewhere_and_the_index_names_every_symptom():
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub makes them
    for target in re.findall(r"\]\(([^):]+)\)", PAGE):
        place, _, anchor = target.partition("#")
        assert anchor in anchors if not place else (FILE.parent / place).exists(), target
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        assert section.count("**Do:**") == 1 and section.count("**Why:**") == 1, section.splitlines()[0]
