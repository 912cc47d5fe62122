import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sdopt import attention, drawing, guidance, models, roofline
from sdopt.errors import UserError
from sdopt.roofline import Ceilings, count, totals


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_product_reads_its_inputs_and_writes_its_output_once():
    x, weight, bias = torch.ones(4, 8), torch.ones(16, 8), torch.ones(16)
    assert totals(count(lambda: linear(x, weight))) == {
        "operators": 1,
        "flops": {"float32": 2 * 4 * 8 * 16},
        "bytes": 4 * (4 * 8 + 8 * 16 + 4 * 16),
    }
    assert totals(count(lambda: linear(x, weight, bias)))["bytes"] == 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16)
    pair, scores = torch.ones(2, 4, 4), torch.empty(2, 4, 4)
    (product,) = count(lambda: torch.baddbmm(scores, pair, pair, beta=0))
    assert product.bytes == 3 * 4 * 32, "what counts for nothing is not read"
    half = count(lambda: linear(x.bfloat16(), weight.bfloat16()))
    assert totals(half)["flops"] == {"bfloat16": 1024} and half.total() == 3, "two casts and a product"


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x: x.view(2, 32).t()[None], 0),
        (lambda x: x[:, :4].reshape(32), 4 * (32 + 32)),
        (lambda x: x.expand(10, 8, 8) + 0.5, 4 * (64 + 640)),
        (lambda x: x.add_(1), 4 * (64 + 64)),
        (lambda x: embedding(torch.tensor([1, 5]), x), 8 * 2 + 2 * 4 * 16),
        (lambda x: torch.empty(1000), 0),
        (lambda x: x.chunk(2)[0].unbind()[0], 0),
    ],
    ids=["views", "copy", "expanded", "in place", "looked up", "empty", "parts"],
)
def test_bytes_are_counted_where_memory_is_touched(call, moved):
    x = torch.ones(8, 8)
    counted = totals(count(lambda: call(x)))
    assert counted["bytes"] == moved and counted["flops"] == {}


def test_attention_on_a_cpu_and_products_of_whole_numbers_are_counted_too():
    q = torch.ones(2, 3, 16, 8)
    (fused,) = count(lambda: scaled_dot_product_attention(q, q, q))
    assert fused.kind == "attention" and fused.flops == 2 * 2 * (2 * 3) * 16 * 16 * 8 and not fused.pointwise
    a = torch.ones(32, 32, dtype=torch.int8)
    (product,) = count(lambda: torch._int_mm(a, a))
    assert (product.kind, product.format, product.flops) == ("matrix product", "int8", 2 * 32**3)
    image, weight = torch.ones(1, 4, 6, 6), torch.ones(8, 4, 3, 3)
    (conv,) = count(lambda: torch.conv2d(image, weight))
    assert (conv.kind, conv.flops) == ("convolution", 2 * 4 * 9 * 8 * 16)


@pytest.mark.parametrize(("name", "unet", "vae"), [("sd15", 0.803, 2.51), ("sdxl", 6.76, 10.47)])
def test_the_flops_of_the_large_models_are_the_known_ones(name, unet, vae):
    """TFLOP a sample, without their weights."""
    parts = {part: json.loads((models.CONFIGS / name / f"{part}.json").read_text()) for part in ("unet", "vae")}
    side, width = parts["unet"]["sample_size"], parts["unet"]["cross_attention_dim"]
    with torch.device("meta"):
        x, prompt = torch.empty(1, 4, side, side), torch.empty(1, 77, width)
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        denoiser, coder = (models._network(parts[part]) for part in ("unet", "vae"))
        asked = count(lambda: denoiser(x, torch.tensor(1.0), prompt, added_cond_kwargs=more))
        decoded = count(lambda: coder.decode(x))
    assert sum(totals(asked)["flops"].values()) / 1e12 == pytest.approx(unet, rel=1e-3)
    assert sum(totals(decoded)["flops"].values()) / 1e12 == pytest.approx(vae, rel=2e-3)


def test_stages_are_counted_apart_and_nothing_stays_behind(pocket):
    attention.plain_attention(pocket)  # whose products PyTorch's own counter knows
    task = replace(drawing.task(models.MODELS["pocket"], runs=1), steps=2, height=64, width=64)
    full = drawing.drawer(pocket, task)
    asked = roofline.count_stages(pocket, full)
    with FlopCounterMode(display=False) as counter:
        full()
    assert set(asked) == {"text_encoder", "unet", "scheduler", "vae"}
    flops = {stage: sum(totals(operators)["flops"].values()) for stage, operators in asked.items()}
    theirs = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert flops["unet"] == theirs["UNet2DConditionModel"]
    assert flops["vae"] == theirs["Decoder"] + 2 * 4 * 4 * 8 * 8, "and the 1x1 convolution before it"
    assert flops["scheduler"] == 0 and flops["text_encoder"] > 0
    half = drawing.drawer(pocket, task, **guidance.cutoff(pocket, 0.5))
    cut = sum(totals(roofline.count_stages(pocket, half)["unet"])["flops"].values())
    assert cut == pytest.approx(0.75 * flops["unet"]), "one of two steps on half the batch"
    assert pocket.unet._compiled_call_impl is None and "decode" not in vars(pocket.vae)


BEST = Ceilings({"float32": 1000.0}, 100.0, 0.5)


def operators(**counted):
    made = {"product": (8000, 40, False), "norm": (0, 300, False), "sum": (0, 200, True), "tiny": (8, 40, False)}
    named = {name: roofline.Operator(name, "other", "float32", *about) for name, about in made.items()}
    return roofline.Counter({named[name]: times for name, times in counted.items()})


@pytest.mark.parametrize(
    ("counted", "way", "seconds", "limit"),
    [
        ({"product": 2, "norm": 1, "sum": 2}, "eager", 2 * 8 + 3 + 2 * 2, "arithmetic"),
        ({"product": 2, "norm": 1, "sum": 2}, "fused", 2 * 8 + 3, "arithmetic"),
        ({"product": 1, "norm": 1, "sum": 4}, "graph", 8 + 3 + 8, "bytes"),
        ({"tiny": 10}, "eager", 10 * 0.5, "launches"),
        ({"tiny": 10}, "graph", 10 * 0.4, "bytes"),
        ({}, "eager", 0.0, "arithmetic"),
    ],
)
def test_a_prediction_is_the_sum_of_the_operators_own_rooflines(counted, way, seconds, limit):
    foreseen = roofline.predict(operators(**counted), BEST, way)
    assert foreseen.seconds == pytest.approx(seconds) and foreseen.limit == limit


def test_what_is_fused_is_left_out_of_the_bytes():
    counted = operators(product=2, sum=3)
    assert totals(counted) == {"operators": 5, "flops": {"float32": 16000}, "bytes": 680}
    assert totals(counted, "fused") == {"operators": 2, "flops": {"float32": 16000}, "bytes": 80}
    with pytest.raises(UserError, match="unknown way to run 'lazy': use one of eager, graph, fused"):
        totals(counted, "lazy")


def test_ceilings_are_measured_in_the_formats_that_are_asked_for():
    before = torch.backends.cuda.matmul.allow_tf32
    best = roofline.ceilings("cpu", ("float32", "int8", "TF32"), side=64, copied=2**16)
    assert sorted(best.flops_per_s) == ["TF32", "float32", "int8"] and min(best.flops_per_s.values()) > 1e6
    assert best.bytes_per_s > 1e6 and 0 < best.launch_s < 1e-2
    assert torch.backends.cuda.matmul.allow_tf32 == before
    with pytest.raises(UserError, match="no product is measured in float8"):
        roofline.ceilings("cpu", ("float8",))


def test_a_format_without_instructions_is_measured_by_a_small_product(monkeypatch):
    took = {"float32": 1e-5, "bfloat16": 4e-3}  # seconds at the side that is tried first
    asked = []
    monkeypatch.setattr(roofline, "product_seconds", lambda name, side, device, **timed: asked.append((name, side)) or took[name])
    assert roofline.within_reach(("float32",), 2048, "cpu") == 2048
    assert roofline.within_reach(("float32", "bfloat16"), 2048, "cpu") == 256, "512 would take 0.256 s"
    asked.clear()
    assert roofline.within_reach(("bfloat16",), 8192, "cuda") == 8192 and not asked, "nothing is tried on a GPU"
    roofline.ceilings("cpu", ("bfloat16", "float32"), copied=2**20)
    assert [pair for pair in asked if pair[1] != roofline.SMALL] == [("bfloat16", 256), ("float32", 2048)]
