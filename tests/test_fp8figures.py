from collections import defaultdict

import torch
from tiny import tiny_sdxl

from sdopt import fp8figures
from sdopt.engine import fp8


def test_each_format_is_a_line_of_ticks_with_its_largest_at_one():
    figure = fp8figures.number_lines({"a": [-2.0, 0.0, 0.5, 1.0, 2.0], "b": [-4.0, 0.0, 4.0]})
    line, powers = figure.axes
    ticks = [sorted({float(path.vertices[0, 0]) for path in drawn.get_paths()}) for drawn in line.collections]
    assert ticks == [[-1, 0, 0.25, 0.5, 1], [-1, 0, 1]]
    above = [sorted({float(path.vertices[0, 0]) for path in drawn.get_paths()}) for drawn in powers.collections]
    assert above == [[0.25, 0.5, 1], [1]]
    assert [label.get_text() for label in line.get_yticklabels()] == ["a", "b"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_curve_a_format_in_percent():
    figure = fp8figures.by_size([1.0, 0.5], {"e4m3": [0.02, 0.03], "int8": [0.01, 0.02]})
    (axes,) = figure.axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"e4m3": [2, 3], "int8": [1, 2]}


def test_a_dot_a_layer_and_way_by_kind_of_layer():
    rows = [
        {"layer": "up.0.attn1", "off": {"bf16": 0.002, "row": 0.02, "tensor": 0.03, "row_outlier": 0.5}},
        {"layer": "up.1.attn1", "off": {"bf16": 0.001, "row": 0.04, "tensor": 0.03}},
        {"layer": "up.0.ff.net.2", "off": {"bf16": 0.002, "row": 0.01}},
    ]
    figure = fp8figures.by_layer([("here", rows), ("recorded: some-gpu", rows[:1])])
    first, second = figure.axes
    dots = [[list(line.get_ydata()) for line in axes.lines if len(line.get_ydata())] for axes in (first, second)]
    assert dots == [[[0.2, 0.1], [2, 4], [3, 3], [0.2], [1]], [[0.2], [2], [3]]]
    assert first.get_title("left") == "here" and len(first.get_xticklabels()) == len(fp8figures.KINDS)
    at = {round(sum(line.get_xdata()) / len(line.get_xdata())) for line in first.lines if len(line.get_xdata())}
    assert at == {0, 5}
    assert [fp8figures.kind_of(f"up.0.attn1.{end}") for end in ("to_q", "to_out.0")] == ["attn1", "attn1.to_out"]


def swept(layer, bf16, row, before):
    seconds = {"bf16": bf16, "row": row, "pass_row": 1.0, "before_bf16": 2.0, "before_row": 1.0}
    seconds |= {"tensor": row / 2, "before_tensor": 1.0}
    return {"layer": layer, "rows": 2, "inputs": 4, "outputs": 8, "before": before, "seconds": seconds}


def test_the_sweep_counts_rounding_in():
    rows = [swept("feed-forward 2", 4.0, 2.0, "geglu"), swept("output", 4.0, 2.0, None)]
    assert fp8figures.whole(rows[0], "bf16") == 6 and fp8figures.whole(rows[0], "row") == 3
    assert fp8figures.whole(rows[1], "bf16") == 4 and fp8figures.whole(rows[1], "row") == 3
    wide = swept("feed-forward 1", 4.0, 3.0, "add_layer_norm") | {"inputs": 8, "outputs": 16}  # the first half of rows[0]
    wide["seconds"] |= {"gated_row": 3.0, "gated_bf16": 5.0}
    convolutions = [
        {"model": "sdxl", "samples": 2, "lines": 3, "inputs": 4, "outputs": 5, "seconds": {"bf16": 3.0, "e4m3": 2.0}},
        {"model": "sd15", "samples": 1, "lines": 1, "inputs": 1, "outputs": 1, "seconds": {"bf16": 1.0, "e4m3": 2.0}},
    ]
    metrics = {"shapes": [*rows, wide], "convolutions": convolutions}
    figure = fp8figures.sweep("recorded: some-gpu", metrics, {"row": 128, "tensor": 32}, 256)
    marks, convolved = (
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines} for axes in figure.axes
    )
    assert marks["feed-forward 2"] == ([64], [3]) and marks["output"] == ([64], [4]), "no pass for what attention writes"
    assert marks["taken from here on, with one scale"][0] == [32, 32]
    assert marks["taken from here on, with a scale a row"][0] == [128, 128] and marks["self-attention"] == ([], [])
    assert marks["feed-forward 1"] == ([256], [6 / 4]) and marks["feed-forward 1, gated in it"] == ([256], [7 / 4])
    assert convolved["sdxl's convolutions"] == ([2 * 9 * 9 * 20], [1.5]) and convolved["sd15's convolutions"] == ([9], [0.5])
    assert convolved["taken from here on"][0] == [256, 256]


@torch.no_grad()
def test_the_sweep_draws_layers_by_the_scales_the_engine_has_for_them():
    unet = tiny_sdxl().unet.bfloat16()
    by_row = defaultdict(set)
    for place, layer in fp8.every_layer(unet, "row").items():
        if isinstance(layer, fp8.Layer):
            name = next(name for name, part in unet.named_modules() if part is layer.parts[0])
            by_row[fp8figures.kind_of(name)].add(layer.by_row)
    drawn = {
        "attn1": "self-attention", "attn2.to_q": "cross-attention", "ff.net.0": "feed-forward 1", "ff.net.2": "feed-forward 2",
        "attn2.to_out": "output",
    }  # fmt: skip
    assert {kind: by_row[kind] for kind in drawn} == {k: {fp8figures.ROUNDED[layer] == "row"} for k, layer in drawn.items()}
