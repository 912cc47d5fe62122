"""fp8 layer by layer, for the studies `fp8-shapes` (what it gains, by shape) and `fp8-errors` (what it costs, against fp32)."""

import statistics
from math import log2

import torch
from torch.nn.functional import conv2d, linear
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from sdopt import attention, compilation, drawing, engine, intervals, models, precision, quality, timing
from sdopt.bench.fusions import CACHE, in_turn
from sdopt.engine import bounds, fp8
from sdopt.fp8figures import multiplications, whole
from sdopt.kernels import add_layer_norm, conv_float8, geglu, linear_geglu, to_float8
from sdopt.pocket.captions import test_prompts

# Positions of a sample and their width, at each level with transformers; a guided step has two samples, after a cutoff one.
LEVELS = {"sdxl": ((4096, 640), (1024, 1280)), "sd15": ((4096, 320), (1024, 640), (256, 1280), (64, 1280))}
# A transformer's layers: inputs and outputs in widths, whether there is a bias, and the kernel before that can round.
LAYERS = {
    "self-attention": (1, 3, False, add_layer_norm),
    "cross-attention": (1, 1, False, add_layer_norm),
    "feed-forward 1": (1, 8, True, add_layer_norm),
    "feed-forward 2": (4, 1, True, geglu),
    "output": (1, 1, True, None),
}
GATED = "feed-forward 1"
# Lines of an image, and channels in and out, of the 3x3 convolutions of residual blocks.
CONVOLUTIONS = {
    "sdxl": ((128, 320, 320), (128, 640, 320), (128, 960, 320), (64, 640, 640), (64, 1280, 640), (64, 1920, 640))
    + ((32, 1280, 1280), (32, 1920, 1280), (32, 2560, 1280)),
    "sd15": ((64, 320, 320), (64, 640, 320), (64, 960, 320), (32, 640, 640), (32, 1280, 640), (16, 1280, 1280))
    + ((16, 2560, 1280), (8, 1280, 1280), (8, 2560, 1280)),
}
SIZES = sorted({(n * positions, width) for levels in LEVELS.values() for positions, width in levels for n in (1, 2)})
WAYS = {  # how a pipeline in bf16 is drawn with: what `engine.prepare` is asked for, None for nothing
    "eager_bf16": None,
    "engine_bf16": {},
    **{f"engine_fp8_{scales}": {"precision": "fp8", "filter": "all", "scales": scales} for scales in fp8.SCALES},
}
CALLS = 6  # of the UNet whose error is looked at
PICTURES, AT_ONCE = 64, 16


def shapes(device, sizes=SIZES, **timed):
    """Seconds of each layer at each size: its product in bf16 and in fp8 with scales a row and a tensor, and what rounds.

    "gated", of a feed-forward's first half: with GEGLU in the same kernel, which in fp8 writes e4m3 by one scale.
    "before": the kernel before it, writing bf16 or e4m3; "pass": rounding apart, where there is no such kernel or for who
    would do without. Inputs take turns, several times a GPU's cache. `timed` goes to `timing.kernel_seconds`.
    """
    found = []
    for rows, width in tqdm(sizes, desc="fp8 shapes"):
        for layer, (inputs, outputs, biased, kernel) in LAYERS.items():
            size = rows, inputs * width, outputs * width
            row = {"layer": layer, "rows": size[0], "inputs": size[1], "outputs": size[2], "before": kernel and kernel.NAME}
            found.append(row | {"seconds": _seconds(device, size, biased, kernel, layer == GATED, timed)})
    return found


def _seconds(device, size, biased, kernel, gated, timed):
    rows, inputs, outputs = size
    new = lambda *shape: torch.randn(shape, device=device).to(fp8.DTYPE)
    sets = []
    for _ in range(1 + min(15, CACHE // (2 * (rows + outputs) * inputs))):
        x, weight, bias = new(rows, inputs), new(outputs, inputs) / inputs**0.5, new(outputs) if biased else None
        one = torch.tensor(0.02, device=device)
        rounded = {
            "row": (to_float8.to_float8(x), to_float8.to_float8(weight)),
            "tensor": (to_float8.to_float8(x, one), to_float8.to_float8(weight, one / 10)),
        }
        sets.append((x, weight, bias, rounded, one))
    ways = {
        "bf16": lambda x, weight, bias, rounded, one: linear(x, weight, bias),
        "row": lambda x, weight, bias, rounded, one: fp8.product(*rounded["row"], bias),
        "tensor": lambda x, weight, bias, rounded, one: fp8.product(*rounded["tensor"], bias),
        "pass_row": lambda x, weight, bias, rounded, one: to_float8.to_float8(x, "row"),
        "pass_tensor": lambda x, weight, bias, rounded, one: to_float8.to_float8(x, one),
    }
    if gated:
        ways["gated_bf16"] = lambda x, weight, bias, rounded, one: linear_geglu.linear_geglu(x, weight, bias)
        ways["gated_row"] = lambda x, weight, bias, rounded, one: linear_geglu.linear_geglu(*rounded["row"], bias, one)
        ways["gated_tensor"] = lambda x, weight, bias, rounded, one: linear_geglu.linear_geglu(*rounded["tensor"], bias, one)
    seconds = {name: timing.kernel_seconds(in_turn(way, sets), device, **timed) for name, way in ways.items()}
    if kernel is None:
        return seconds
    given = [(new(rows, inputs), new(rows, inputs)) if kernel is add_layer_norm else new(rows, 2 * inputs) for _ in sets]
    norm = new(inputs), new(inputs)
    for name, scales in (("bf16", None), ("row", "row"), ("tensor", sets[0][-1])):
        if kernel is add_layer_norm:
            way = lambda pair, scales=scales: add_layer_norm.add_layer_norm(*pair, *norm, 1e-5, scales)
        else:
            way = lambda x, scales=scales: geglu.geglu(x, scales)
        turns = in_turn(way, [(one,) for one in given])
        seconds[f"before_{name}"] = timing.kernel_seconds(turns, device, **timed)
    return seconds


def convolutions(device, sizes=CONVOLUTIONS, samples=2, **timed):
    """Seconds of each convolution in bf16, cuDNN having tried its kernels, and in e4m3 without what rounds: {"bf16", "e4m3"}."""
    found = []
    for model, shapes in sizes.items():
        for lines, inputs, outputs in tqdm(shapes, desc=f"fp8 convolutions, {model}"):
            shape = {"model": model, "samples": samples, "lines": lines, "inputs": inputs, "outputs": outputs}
            found.append(shape | {"seconds": _convolved(device, samples, lines, inputs, outputs, timed)})
    return found


def _convolved(device, samples, lines, inputs, outputs, timed):
    new = lambda *shape: torch.randn(shape, device=device).to(fp8.DTYPE).to(memory_format=torch.channels_last)
    sets = []
    for _ in range(1 + min(15, CACHE // (2 * samples * lines**2 * (inputs + outputs)))):
        x, weight = new(samples, inputs, lines, lines), new(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
        sets.append((x, weight, conv_float8.bordered(x, torch.tensor(0.02, device=device)), conv_float8.rounded(weight)))
    ways = {
        "bf16": lambda x, weight, *_: conv2d(x, weight, padding=1),
        "e4m3": lambda x, weight, *rounded: conv_float8.conv_float8(*rounded),
    }
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return {name: timing.kernel_seconds(in_turn(way, sets), device, **timed) for name, way in ways.items()}


def fewest(rows, way="row"):
    """From how many multiplications on fp8 is to be taken, a power of two: what makes all layers of `shapes` fastest in sum."""
    return _fewest((multiplications(row), whole(row, "bf16"), whole(row, way)) for row in rows if row["before"])


def fewest_of_convolutions(rows):
    """The same of `convolutions`; what writes e4m3 before them writes fewer bytes than in bf16, and is left out."""
    return _fewest((multiplications(row), row["seconds"]["bf16"], row["seconds"]["e4m3"]) for row in rows)


def _fewest(layers):
    """Of layers (multiplications, seconds in bf16, seconds in fp8); of none smaller than these."""
    layers = list(layers)
    least = int(log2(min(count for count, *_ in layers)))
    spent = lambda fewest: sum(fp8 if count >= fewest else bf16 for count, bf16, fp8 in layers)
    return min((2**n for n in range(least, 40)), key=spent)


def errors(device, names=(("pocket", "shipped"), ("sdxl", "random")), pictures=PICTURES):
    """What fp8 costs against fp32, beside what bf16 does: by layer and by call of the UNet, and by pocket's pictures."""
    found = {"layers": [], "calls": []}
    precision.set_tf32("nowhere")
    for name, weights in tqdm(names, desc="fp8 errors"):
        pipe = models.load(name, weights, device)
        pipe.set_progress_bar_config(disable=True)
        calls = recorded(pipe, drawing.task(models.MODELS[name], 1))
        attention.sdpa(precision.half_precision(pipe))
        compilation.channels_last(pipe)
        found["layers"] += [{"model": name} | row for row in layer_errors(pipe.unet, calls[len(calls) // 2])]
        found["calls"].append({"model": name} | call_errors(pipe, calls))
        del pipe, calls
    return found | {"pictures": picture_errors(device, pictures)}


@torch.no_grad()
def recorded(pipe, task, steps=CALLS):
    """The calls of the UNet while the task's first picture is drawn in `steps` steps: [((args, kwargs), output)]."""
    seen = []

    def keep(run, *args, **kwargs):
        output = run(*args, **kwargs)
        seen.append(((args, kwargs), output[0].float()))
        return output

    with timing.around_calls(pipe.unet, keep):
        drawing.drawer(pipe, task, num_inference_steps=steps)(0, "latent")
    return seen


def _in_half(call):
    """The arguments of a call in bfloat16, but for its timestep."""
    (sample, timestep, *args), kwargs = call
    half = lambda tree: tree_map_only(torch.Tensor, lambda t: t.to(fp8.DTYPE) if t.is_floating_point() else t, tree)
    return (half(sample), timestep, *half(args)), half(kwargs)


@torch.no_grad()
def layer_errors(unet, call):
    """RMS of each layer's error relative to its output in fp32, on the inputs it gets in `call` of a UNet in bfloat16.

    A row a layer: {"layer", "off": {"bf16", "row", "tensor", "bf16_outlier", "row_outlier", "tensor_outlier"}}; "outlier": one
    channel of the input of a linear layer 64 times as large, where its scale is not a bound of what a norm gives. What is called
    exact has the same bfloat16 weights and inputs, multiplied in float32.
    """
    kinds = {scales: fp8.every_layer(unet, scales) for scales in fp8.SCALES}
    names, inputs, hooks = {part: name for name, part in unet.named_modules()}, {}, []
    first = lambda layer: layer.conv if isinstance(layer, fp8.Convolution) else layer.parts[0]
    for place, layer in kinds["row"].items():
        listen = lambda part, args, place=place: inputs.__setitem__(place, args[0])
        hooks.append(first(layer).register_forward_pre_hook(listen))
    (args, kwargs) = _in_half(call[0])
    unet(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    for layers in kinds.values():
        fp8.gather(list(layers.values()))
    rows = []
    for place, x in inputs.items():
        of_place = {scales: layers[place] for scales, layers in kinds.items()}
        off = (_convolution_off if isinstance(of_place["row"], fp8.Convolution) else _linear_off)(of_place, x)
        rows.append({"layer": names[first(of_place["row"])], "off": off})
    return rows


def _linear_off(layers, x):
    parts, bias = layers["row"].parts, layers["row"].parts[0].bias
    weight, far = torch.cat([part.weight for part in parts]), x.clone()
    far[..., 0] *= 64
    off = {}
    for ending, given in (("", x), ("_outlier", far)):
        exact = linear(given.float(), weight.float(), None if bias is None else bias.float())
        ways = {"bf16": linear(given, weight, bias)}
        for scales, layer in layers.items():
            if layer.by_row or not (ending and layer.after):  # what no norm gives is beyond a bound from norms
                takes = bounds.of_values(given) if layer.takes is None else layer.takes
                ways[scales] = layer(to_float8.to_float8(given.contiguous(), takes))
        off |= {way + ending: relative(y, exact) for way, y in ways.items()}
    return off


def _convolution_off(layers, x):
    conv = layers["row"].conv
    exact = conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)
    ways = {"bf16": conv2d(x, conv.weight, conv.bias, padding=1)}
    for scales, layer in layers.items():
        ways[scales] = layer(conv_float8.bordered(x, layer.takes)) + conv.bias[:, None, None]
    return {way: relative(y, exact) for way, y in ways.items()}


@torch.no_grad()
def call_errors(pipe, calls):
    """RMS of the UNet's error relative to its output in fp32, over `calls`: the median and the largest, for each of WAYS."""
    return {way: {"median": statistics.median(off), "max": max(off)} for way, off in _each_way(pipe, lambda: _off(pipe, calls))}


def _off(pipe, calls):
    off = []
    for call, exact in calls:
        args, kwargs = _in_half(call)
        off.append(relative(pipe.unet(*args, **kwargs)[0], exact))
    return off


def _each_way(pipe, look):
    """What `look()` sees with `pipe` as it is and as the engine has it, each of WAYS in turn."""
    for way, settings in WAYS.items():
        if settings is not None:
            engine.prepare(pipe, **settings)
        yield way, look()
        engine.restore(pipe)


def picture_errors(device, pictures):
    """How far pocket's pictures are from those in fp32, from the same noise: a PSNR in dB, mean and interval, a row a way."""
    task = drawing.gallery(models.MODELS["pocket"], test_prompts(pictures), AT_ONCE)
    draw = lambda: torch.cat([images for images, _ in drawing.pictures(pipe, task)])
    pipe = models.load("pocket", device=device)
    pipe.set_progress_bar_config(disable=True)
    exact = draw()
    attention.sdpa(precision.half_precision(pipe))
    decibels = lambda: quality.psnr_db(draw(), exact).clamp(max=quality.CEILING_DB).tolist()
    return [{"way": way, "psnr_db": intervals.mean(off)} for way, off in _each_way(pipe, decibels)]


def relative(y, exact):
    """The root mean square of an error, relative to that of what is exact."""
    return ((y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
