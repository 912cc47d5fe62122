"""The kernels of e4m3 compiled for GPUs that need not be there: in a process of its own, without the interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import torch
from sdopt.kernels import add_layer_norm, conv_float8, geglu, linear_geglu, prompt_attention, self_attention, softmax, to_float8

TYPES = {"out": "*fp8e4nv", "scale": "*fp32", "eps": "fp32"}
TYPES |= dict.fromkeys(("rows", "wide", "half", "channels", "high", "outputs", "inputs", "positions", "tokens"), "i32")
TYPES |= dict.fromkeys(("k_batch", "k_row", "v_batch", "v_row"), "i32")
TYPES |= dict.fromkeys(("of_all", "of_x", "of_weight", "of_out"), "*fp32")
KERNELS = [
    (to_float8._to_float8, {"TALL": 2, "WIDE": 2048, "OWN": True}),
    (to_float8._to_float8, {"TALL": 1, "WIDE": 8192, "OWN": False}),
    (add_layer_norm._add_layer_norm, {"TALL": 2, "WIDE": 2048, "ADD": True, "SCALED": True, "OWN": True}),
    (add_layer_norm._add_layer_norm, {"TALL": 2, "WIDE": 2048, "ADD": False, "SCALED": True, "OWN": False}),
    (geglu._geglu_rows, {"TALL": 1, "WIDE": 4096, "REST": 1024}),
    (geglu._geglu_rows, {"TALL": 4, "WIDE": 512, "REST": 0}),
    (geglu._geglu, {"TALL": 4, "WIDE": 512, "SCALED": True}),
    (
        prompt_attention._prompt_attention,
        {"TALL": 64, "TOKENS": 128, "WIDE": 64, "WIDTH": 64, "EXACT": False, "ROUNDS": True},
    ),
]

def compiled(kernel, constants, capability, types={}, **options):
    names, types = kernel.arg_names, TYPES | types
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8} | options)

for capability in (89, 90):
    for kernel, constants in KERNELS:
        types = {"scale": "fp32"} if kernel is prompt_attention._prompt_attention else {}
        assert "satfinite.e4m3x2" in compiled(kernel, constants, capability, types).asm["ptx"], (kernel, capability)
for capability, memory in ((89, 99 * 1024), (90, 227 * 1024)):  # what a multiprocessor has for one tile
    for lines in (128, 32):  # several tiles a program, and one
        tall, across, deep, warps, stages, several = conv_float8.tile(2 * (lines + 1) ** 2, 10 * 2**12 // lines, 132, memory)
        types = {"x": f"tensordesc<fp8e4nv[{tall}, {deep}]>", "weight": f"tensordesc<fp8e4nv[{across}, {deep}]>"}
        types |= {"out": "*bf16", "x_scale": "*fp32", "scales": "*fp32"}
        constants = {"TALL": tall, "ACROSS": across, "DEEP": deep, "SEVERAL": several, "EXACT": False}
        found = compiled(conv_float8._conv, constants, capability, types, num_warps=warps, num_stages=stages)
        assert found.metadata.shared <= memory, (capability, found.metadata.shared)
    for rounds, name in ((False, "bf16"), (True, "fp8e4nv")):
        tall, wide, width = self_attention.QUERIES, self_attention.KEYS, self_attention.FAST
        tiles = {part: f"tensordesc<bf16[1, {n}, {width}]>" for part, n in (("of_query", tall), ("of_key", wide))}
        tiles |= {"out": f"tensordesc<{name}[1, {tall}, {width}]>", "scale": "fp32"}
        constants = {"TALL": tall, "WIDE": wide, "WIDTH": width, "CUT": rounds, "EXACT": False, "ROUNDS": rounds}
        found = compiled(self_attention._self_attention, constants, capability, tiles, num_warps=4, num_stages=2)
        assert 2 * found.metadata.shared <= memory, (capability, "two programs", found.metadata.shared)
    kinds = (torch.float8_e4m3fn, "fp8e4nv"), (torch.bfloat16, "bf16")
    for rows, (dtype, name) in itertools.product((8192, 1024), kinds):
        tall, wide, deep, warps, stages = linear_geglu.tile_of(rows, 5120, dtype, dtype, memory, 132)
        types = {"x": f"tensordesc<{name}[{tall}, {deep}]>", "weight": f"tensordesc<{name}[2, {wide}, {deep}]>"}
        types |= {"out": f"tensordesc<{name}[{tall}, {wide}]>"}
        rounded = dtype is torch.float8_e4m3fn
        constants = {"TALL": tall, "WIDE": wide, "DEEP": deep, "TOGETHER": 8, "EXACT": False}
        constants |= {"ROUNDED": "row" if rounded else "", "ROUNDS": rounded}
        found = compiled(linear_geglu._linear_geglu, constants, capability, types, num_warps=warps, num_stages=stages)
        assert found.metadata.shared <= memory, (capability, name, found.metadata.shared)
for whole in (True, False):
    types = {"scores": "*fp32", "out": "*bf16", "length": "i32", "scale": "fp32"}
    compiled(softmax._softmax, {"WIDE": softmax.WIDE, "WHOLE": whole}, 90, types, num_warps=16)
try:
    compiled(*KERNELS[0], 80)
except Exception as error:
    assert "fp8e4nv not supported" in str(error), error
    print("compiled")
"""


def test_they_compile_for_the_generations_that_have_e4m3_and_for_no_older(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip() == "compiled", ended.stderr
