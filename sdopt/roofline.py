"""What a call has to compute and to move, operator by operator, and how fast this device could do it at best.

The prediction is a sum of rooflines. An operator (a product, a norm, a sum: what PyTorch starts one kernel for) takes the
longer of two times: its FLOPs at the rate of a large matrix product in its number format, and its bytes at the rate of a
large copy. The sum over all operators of a call is what they take one after another with nothing between them; rates are
measured (`ceilings`), not read from a data sheet. Nothing is fitted.

Counting rules. FLOPs are those of products, convolutions and attention, two for a multiplication and its addition, by their
shapes (torch.utils.flop_counter); what else is computed is not counted, its bytes are. Bytes: each operator reads each of its
inputs once, weights among them, and writes its outputs once; views are free; what is expanded counts once; of a table that is
looked up in, the rows that are read. So more than 100 % of a ceiling can be reached: of the bytes by tensors that stay in a
cache, of the FLOPs by algorithms that need fewer than the definition has (Winograd's convolution).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sdopt.errors import UserError
from sdopt.profiling import OTHER
from sdopt.timing import around_stages, in_turns, kernel_seconds

aten = torch.ops.aten
# Two that PyTorch's counter does not know: attention on a CPU, and products of whole numbers.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._int_mm: flop_registry[aten.mm],
}
# Without these a pointwise operator could be computed along with the one that writes its input. These need all of a row,
# or of a group of channels, before they can write its first number.
NORMS = (aten.native_group_norm, aten.native_layer_norm, aten._softmax)
TABLES = (aten.embedding, aten.index, aten.index_select, aten.gather)
FREE = (aten._unsafe_view, aten.lift_fresh, aten.empty, aten.empty_like, aten.empty_strided, aten._local_scalar_dense)
WAYS = {
    "eager": "every operator a kernel that Python starts",
    "graph": "every operator a kernel, started by a CUDA graph",
    "fused": "pointwise operators computed by their neighbours, started by a CUDA graph or compiled code",
}
SIDE = {"cuda": 8192, "cpu": 2048}  # of the product whose rate is a ceiling
SMALL, REACH_S = 128, 0.25  # on a CPU: the side that is tried first, and seconds that a product may take
COPIED = {"cuda": 2**29, "cpu": 2**27}  # bytes, far more than a cache holds


@dataclass(frozen=True)
class Operator:
    """One operator of a call: its name, kind (as in `profiling`) and number format; FLOPs and bytes of one execution."""

    name: str
    kind: str
    format: str
    flops: int
    bytes: int
    pointwise: bool


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best: FLOP/s by number format, bytes/s, and seconds that Python needs to start one operator."""

    flops_per_s: dict[str, float]
    bytes_per_s: float
    launch_s: float


@dataclass(frozen=True)
class Prediction:
    """Seconds at the least, and what limits them: "arithmetic", "bytes" or "launches"."""

    seconds: float
    limit: str


def count(call: Callable[[], object]) -> Counter[Operator]:
    """Run `call()` and count its operators: {Operator: how often it ran}.

    On any device; on "meta" without weights, too, but there attention is the formula's operators. What is compiled or inside a
    CUDA graph runs past PyTorch's dispatcher: count it before. Introduced in notebooks/10_the_whole_path.
    """
    with _Count() as counting:
        call()
    return counting.seen


def count_stages(pipe, call: Callable[[], object]) -> dict[str, Counter[Operator]]:
    """The operators of one `call()` by stage, {"text_encoder", "unet", "scheduler", "vae"}: as `timing.stages` divides it.

    Introduced in notebooks/10_the_whole_path.
    """
    seen = {stage: Counter() for stage in ("text_encoder", "unet", "scheduler", "vae")}

    def counted(stage, run, *args, **kwargs):
        with _Count() as counting:
            result = run(*args, **kwargs)
        seen[stage].update(counting.seen)
        return result

    with around_stages(pipe, counted):
        call()
    return seen


def formats(operators: Iterable[Operator]) -> set[str]:
    """The number formats that are calculated in, for `ceilings`."""
    return {operator.format for operator in operators if operator.flops}


def ceilings(device: str, formats: Iterable[str] = ("float32",), side: int | None = None, copied: int | None = None):
    """Measure `Ceilings`: a square product in each of the `formats`, a copy, and a sum of two numbers, asked for by Python.

    Of each the best of some rounds. `side` of the matrices and bytes `copied`: None takes SIDE and COPIED. Some seconds.
    Introduced in notebooks/10_the_whole_path.
    """
    kind = torch.device(device).type
    side, copied = side or SIDE[kind], copied or COPIED[kind]
    sides = {name: within_reach((name,), side, device) for name in sorted(formats)}
    rates = {name: 2 * most**3 / product_seconds(name, most, device, pick=min) for name, most in sides.items()}
    to, of = torch.ones(2, copied, dtype=torch.uint8, device=device)
    moved = 2 * copied / kernel_seconds(lambda: to.copy_(of), device, repeats=3, rounds=9, pick=min)
    one = torch.zeros(1, device=device)
    return Ceilings(rates, moved, in_turns([lambda: one.add_(1)], device, repeats=1000, pick=min)[0])


def within_reach(names: Iterable[str], side: int, device: str) -> int:
    """The largest side, halved from `side`, of a square product that takes REACH_S at most in each of the formats `names`.

    On a GPU `side` itself. A CPU without instructions for a format takes minutes over a large product, by which a small one's
    rate is no other. Introduced in notebooks/02_bf16.
    """
    if torch.device(device).type != "cpu":
        return side
    small = [product_seconds(name, SMALL, device, repeats=1, rounds=5, pick=min) for name in names]
    while side > SMALL and max(small) * (side / SMALL) ** 3 > REACH_S:
        side //= 2
    return side


def product_seconds(name: str, side: int, device: str, **timed) -> float:
    """Seconds of a square matrix product in the format `name`: "float32", "TF32", "bfloat16", "float16", "fp8" or "int8".

    `timed` goes to `kernel_seconds`, {"repeats": 3, "rounds": 9} where nothing else is said. Raises UserError for
    another name. Introduced in notebooks/02_bf16.
    """
    if name not in ("float32", "TF32", "bfloat16", "float16", "fp8", "int8"):
        raise UserError(f"no product is measured in {name}: use float32, TF32, bfloat16, float16, fp8 or int8")
    a, b = torch.randn(2, side, side, device=device)
    call = lambda: a @ b
    if name == "int8":
        a, b = ((20 * x).round().clamp(-127, 127).to(torch.int8) for x in (a, b))
        call = lambda: torch._int_mm(a, b.T)
    elif name == "fp8":
        one, a, b = torch.ones((), device=device), *(x.to(torch.float8_e4m3fn) for x in (a, b))
        call = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    elif name != "TF32":
        a, b = (x.to(getattr(torch, name)) for x in (a, b))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
    try:
        return kernel_seconds(call, device, **{"repeats": 3, "rounds": 9} | timed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def predict(operators: Counter[Operator], ceilings: Ceilings, way: str = "eager") -> Prediction:
    """The least time of `operators`, run in one of WAYS: the sum of their rooflines; eager, no less than all launches take.

    Introduced in notebooks/10_the_whole_path.
    """
    limits = {"arithmetic": 0.0, "bytes": 0.0}
    for operator, times in _run(operators, way).items():
        computing = operator.flops / ceilings.flops_per_s[operator.format] if operator.flops else 0.0
        moving = operator.bytes / ceilings.bytes_per_s
        limits["arithmetic" if computing > moving else "bytes"] += times * max(computing, moving)
    kernels, launches = sum(limits.values()), operators.total() * ceilings.launch_s
    if way == "eager" and launches > kernels:
        return Prediction(launches, "launches")
    return Prediction(kernels, max(limits, key=limits.get))


def totals(operators: Counter[Operator], way: str = "eager") -> dict:
    """{"operators", "flops": {format: FLOPs}, "bytes"} of all, run in one of WAYS.

    Introduced in notebooks/10_the_whole_path.
    """
    run = _run(operators, way)
    flops = Counter()
    for operator, times in run.items():
        if operator.flops:
            flops[operator.format] += times * operator.flops
    moved = sum(times * operator.bytes for operator, times in run.items())
    return {"operators": run.total(), "flops": dict(flops), "bytes": moved}


def _run(operators, way):
    """The operators that are kernels of their own in a way of WAYS."""
    if way not in WAYS:
        raise UserError(f"unknown way to run '{way}': use one of {', '.join(WAYS)}")
    return Counter({o: times for o, times in operators.items() if not (way == "fused" and o.pointwise)})


class _Count(TorchDispatchMode):
    """Within, every operator that touches memory is put into `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet in FREE or _is_view(function):
            return result
        read = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        if kwargs.get("beta") == 0:  # what would be added is not read
            read = read[1:]
        if packet in TABLES:  # of the table itself no more is read than is written
            read = [*read[1:], *written]
        flops = int(FLOPS[packet](*args, **kwargs, out_val=result)) if packet in FLOPS else 0
        kind = _kind(packet, flops)
        name = function.name().removesuffix(f".{function._overloadname}")
        self.seen[
            Operator(
                name,
                kind,
                _format(kind, read),
                flops,
                sum(map(_bytes, (*read, *written))),
                pointwise=not flops and packet not in NORMS,
            )
        ] += 1
        return result


def _is_view(function):
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _kind(packet, flops):
    if not flops:
        return OTHER
    name = packet.__name__
    return "attention" if "attention" in name else "convolution" if "conv" in name else "matrix product"


def _format(kind, tensors):
    """The number format that an operator calculates in; of float32 on a GPU, whether products may round to TF32."""
    first = next((x for x in tensors if x.is_floating_point() or x.dtype is torch.int8), None)
    if first is None:
        return ""
    rounds = torch.backends.cudnn.allow_tf32 if kind == "convolution" else torch.backends.cuda.matmul.allow_tf32
    if first.is_cuda and first.dtype is torch.float32 and kind in ("convolution", "matrix product") and rounds:
        return "TF32"
    return str(first.dtype).removeprefix("torch.")


def _bytes(tensor):
    """Bytes of a tensor's own numbers: a dimension that is expanded repeats them."""
    own = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(own) * tensor.itemsize
