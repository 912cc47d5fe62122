"""python -m sdopt.bench.lessons STUDY: what the notebooks say about a GPU, measured on one for their readers.

The studies: kernels, tradeoff, fp8-shapes, fp8-errors.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from tqdm import tqdm

from sdopt import (
    attention,
    autoencoders,
    compilation,
    drawing,
    guidance,
    models,
    precision,
    quality,
    quantization,
    results,
    roofline,
    schedulers,
)
from sdopt.errors import UserError, exit_code
from sdopt.pocket.captions import test_prompts
from sdopt.pocket.oracle import load_oracle
from sdopt.timing import in_turns, kernel_seconds

PRODUCTS = (1024, 4096, 8192)
ATTENTION = {
    "pocket": (2, 4, 256, 32),
    "sd15": (2, 8, 4096, 40),
    "sdxl": (2, 10, 4096, 64),
}  # batch, heads, tokens, width
LINEARS = (  # rows, inputs, outputs: pocket's widest, then SDXL's, then Stable Diffusion 1.5's
    *((512, 128, 1024), (8192, 640, 640), (8192, 640, 5120), (8192, 2560, 640)),
    *((2048, 1280, 1280), (2048, 1280, 10240), (2048, 5120, 1280)),
    *((8192, 320, 2560), (2048, 640, 5120), (512, 1280, 10240), (512, 5120, 1280)),
)
PROJECTIONS = ((512, 128), (8192, 640), (2048, 1280))  # rows, width: pocket's and SDXL's self-attention


@dataclass(frozen=True)
class Variant:
    """One way to draw a picture, each with fewer UNet samples or a smaller decoder than the last."""

    scheduler: str
    steps: int
    cutoff: float = 1.0
    vae: str = "full"

    @property
    def id(self):
        return f"{self.scheduler}_{self.steps}_cutoff_{self.cutoff:g}_{self.vae}"


CUTOFFS = (0.0, 0.2, 0.4, 0.6, 1.0)
VARIANTS = (
    *(Variant("euler", steps) for steps in (5, 10, 20, 30)),
    *(Variant("dpm", steps, cutoff) for steps in (5, 10, 20, 30) for cutoff in CUTOFFS),
    *(Variant("euler", 30, vae="tiny"), Variant("dpm", 20, vae="tiny"), Variant("dpm", 20, 0.4, "tiny")),
)
REFERENCE = Variant("dpm", 60)
FP8 = ("fp8-shapes", "fp8-errors")


def products(device, sizes=PRODUCTS):
    """Square matrix products in each number format, as TFLOP/s (int8: the same count of whole-number operations)."""
    found = []
    for size in sizes:
        for name in ("float32", "TF32", str(precision.half_dtype(device))[6:], "int8"):
            seconds = roofline.product_seconds(name, size, device, repeats=5, rounds=15)
            found.append({"size": size, "format": name, "seconds": seconds, "tflops": 2 * size**3 / seconds / 1e12})
    return found


def clock(device, size=8192):
    """Four products: how long it took to ask for them, and to have them."""
    a = torch.randn(size, size, device=device)
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    (a @ a), wait()
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    asked = time.perf_counter() - start
    wait()
    return {"size": size, "asked_s": asked, "done_s": time.perf_counter() - start}


def attentions(device, shapes=ATTENTION):
    """One attention layer at each model's largest size, in 16 bits: by the formula, by each backend, and PyTorch's pick."""
    found = []
    for name, shape in shapes.items():
        q, k, v = (torch.randn(shape, device=device).to(precision.half_dtype(device)) for _ in range(3))

        def formula():
            return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

        def pinned(backend):
            with sdpa_kernel(backend), catch_warnings():
                simplefilter("ignore")
                scaled_dot_product_attention(q, k, v)

        row = {"model": name, "shape": list(shape), "seconds": {"formula": kernel_seconds(formula, device)}}
        row["seconds"]["PyTorch's pick"] = kernel_seconds(lambda: scaled_dot_product_attention(q, k, v), device)
        for backend, kind in attention.BACKENDS.items():
            try:
                pinned(kind)
            except RuntimeError:
                continue  # no kernel of this backend for this device, dtype or width
            row["seconds"][backend] = kernel_seconds(lambda: pinned(kind), device)
        with torch.profiler.profile() as profile:
            scaled_dot_product_attention(q, k, v)
        names = sorted({e.key for e in profile.key_averages() if "attention" in e.key and e.key.startswith("aten::_")})
        found.append(row | {"picked": names})
    return found


def linears(device, shapes=LINEARS):
    """One linear layer in 16 bits and in int8: eager, compiled, and the product alone with its input rounded before."""
    half = precision.half_dtype(device)
    options = compilation.CUDA_OPTIONS if str(device).startswith("cuda") else None
    found = []
    for rows, inputs, outputs in tqdm(shapes, desc="int8 layers"):
        plain, rounded = (torch.nn.Linear(inputs, outputs).to(device, half) for _ in range(2))
        torch.compiler.reset()  # a graph a shape, of which PyTorch keeps no more than a few
        compiled = torch.compile(quantization.int8_layer(rounded), fullgraph=True, dynamic=False, options=options)
        x = torch.randn(rows, inputs, device=device).to(half)
        a, b = _whole_numbers(x), _whole_numbers(plain.weight)
        ways = {"half": lambda: plain(x), "int8": lambda: compiled(x), "product": lambda: torch._int_mm(a, b.T)}
        seconds = {name: kernel_seconds(call, device) for name, call in ways.items()}
        seconds["int8_eager"] = _launched(lambda: rounded(x), device)  # it asks the GPU for values: no graph holds it
        found.append({"rows": rows, "inputs": inputs, "outputs": outputs, "seconds": seconds})
    return found


def projections(device, shapes=PROJECTIONS):
    """Query, key and value by three products and by one: launched by Python, and with launches left out."""
    found = []
    for rows, width in shapes:
        x = torch.randn(rows, width, device=device).to(precision.half_dtype(device))
        weights = [torch.randn(width, width, device=device).to(x.dtype) / width**0.5 for _ in range(3)]
        wide = torch.cat(weights)
        three, one = lambda: [linear(x, w) for w in weights], lambda: linear(x, wide).chunk(3, -1)
        launched, kernels = {}, {}
        for name, call in (("three", three), ("one", one)):
            launched[name], kernels[name] = _launched(call, device), kernel_seconds(call, device)
        found.append({"rows": rows, "width": width, "launched_s": launched, "kernels_s": kernels})
    return found


def _whole_numbers(x):
    return (20 * x).round().clamp(-127, 127).to(torch.int8)


def _launched(call, device):
    """Seconds of one call, launched by Python, in a row of fifty."""
    return in_turns([call], device, repeats=50)[0]


def tradeoff(device, variants=VARIANTS, prompts=768, runs=3, batch=256, tell=lambda rows: None):
    """Rows of pocket in 16 bits with SDPA, eager: each variant's time alone, and what `prompts` pictures of it show.

    Times come first, of single pictures; pictures are then drawn in batches. "against_60_steps" is their mean PSNR to 60
    steps of DPM++ 2M, fully guided, from the same noise. `tell(rows)` gets the rows when the times are known.
    """
    model = models.MODELS["pocket"]
    pipes, rows = {}, []
    for vae in ("full", "tiny"):
        pipe = models.load("pocket", device=device)
        pipe.set_progress_bar_config(disable=True)
        pipes[vae] = attention.sdpa(precision.half_precision(pipe))
    autoencoders.tiny_vae(pipes["tiny"])
    short = drawing.task(model, runs)
    for variant in tqdm(variants, desc="times"):
        pipe, call = _prepared(pipes, variant)
        numbers, _ = drawing.measure(pipe, short, **call)
        numbers.pop("peak_memory_of")
        settings = {
            "scheduler": variant.scheduler,
            "steps": variant.steps,
            "cutoff": variant.cutoff,
            "vae": variant.vae,
        }
        rows.append(
            {"id": variant.id, "label": variant.id, "settings": settings, "status": "ok", "quality": None} | numbers
        )
    tell(rows)

    asked = test_prompts(prompts)
    load_oracle().to(device)
    reference = _draw(pipes, REFERENCE, model, asked, batch)
    for row, variant in zip(tqdm(rows, desc="pictures"), variants):
        images = _draw(pipes, variant, model, asked, batch)
        seen = quality.seen([(p.text, p.scene) for p in asked], images)
        row["quality"] = seen | {"against_60_steps": quality.share([(db,) for db in quality.psnr_db(images, reference).tolist()])}
    return rows


def _prepared(pipes, variant):
    pipe = schedulers.use_scheduler(pipes[variant.vae], variant.scheduler)
    return pipe, {"num_inference_steps": variant.steps} | guidance.cutoff(pipe, variant.cutoff)


def _draw(pipes, variant, model, asked, batch):
    """One picture a prompt, uint8 [N, 3, H, W]; prompt i starts from the noise of seed i."""
    task = drawing.gallery(model, asked, batch)
    pipe, call = _prepared(pipes, variant)
    return torch.cat([images for images, _ in drawing.pictures(pipe, task, **call)])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdopt.bench.lessons", description=__doc__)
    parser.add_argument("study", choices=("kernels", "tradeoff", *FP8))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result file (default: out)")
    parser.add_argument("--prompts", type=int, default=768, help="tradeoff: pictures a variant (default: 768)")
    parser.add_argument("--runs", type=int, default=3, help="tradeoff: timed calls a variant (default: 3)")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options):
    if not torch.cuda.is_available():
        raise UserError("these studies are about a GPU: run them where there is one")
    torch.set_grad_enabled(False)
    device = "cuda"
    head = {"schema": results.SCHEMA, "environment": results.environment(device)}
    if options.study == "kernels":
        from sdopt.bench.fusions import fusions  # which needs Triton, and only a GPU's PyTorch brings it

        head |= {"study": "kernels", "settings": {"dtype": str(precision.half_dtype(device))[6:]}}
        measured = {}
        for part in tqdm((products, clock, attentions, projections, linears, fusions), desc="kernels"):
            measured[part.__name__] = part(device)
            results.write_json(options.out / "kernels.json", head | {"metrics": measured})
        return
    if options.study in FP8:
        return _fp8(options, head, device)
    model = models.MODELS["pocket"]
    settings = {
        "model": "pocket", "weights": "shipped", "height": model.height, "width": model.width, "steps": 20,
        "guidance_scale": model.guidance_scale, "batch": 1, "scheduler": "dpm", "seed": 0,
        "prompt": f"{options.prompts} test prompts", "runs": options.runs,
    }  # fmt: skip
    head |= {"study": "pocket-tradeoff", "settings": settings}
    keep = lambda rows: results.write(options.out / "pocket-tradeoff.json", head | {"rows": rows})
    keep(tradeoff(device, prompts=options.prompts, runs=options.runs, tell=keep))


def _fp8(options, head, device):
    if not quantization.has_fp8(device):
        raise UserError("this study is about fp8: run it where the GPU has compute capability 8.9 or later")
    from sdopt.bench import rounding, throughput

    head |= {"study": options.study, "settings": {"dtype": "bfloat16"}}
    if options.study == "fp8-shapes":
        found = {"products": throughput.ceiling(device), "shapes": rounding.shapes(device)}
        found |= {"convolutions": rounding.convolutions(device)}
        fewest = {way: rounding.fewest(found["shapes"], way) for way in ("row", "tensor")}
        found |= {"fewest": fewest | {"convolution": rounding.fewest_of_convolutions(found["convolutions"])}}
    else:
        found = rounding.errors(device)
    results.write_json(options.out / f"{options.study}.json", head | {"metrics": found})


if __name__ == "__main__":
    sys.exit(main())
