"""Exercises of notebooks/06_int8."""

import torch

from sdopt import attention, models, quantization
from sdopt.exercises import number


def _quantise(answer):
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [0.1], [1], [10], [1e3], [0]]
    )
    q, scale = answer(w.clone())
    if q.dtype != torch.int8 or q.shape != w.shape:
        return f"q should be int8 {list(w.shape)}, yours is {str(q.dtype)[6:]} {list(q.shape)}"
    if scale.shape != (6, 1):
        return f"scale should be [6, 1], one a row, yours is {list(scale.shape)}"
    back = q.float() * scale
    if not back.isfinite().all() or (back[5] != 0).any():
        return "a row of zeros does not come back as zeros: what is its scale?"
    step = w.abs().amax(1, keepdim=True) / 127
    over = (back - w).abs() > 0.505 * step
    if over.any():
        row = int(over.any(1).nonzero()[0])
        return f"row {row} comes back wrong by more than half a step, {(back - w).abs()[row].max() / step[row, 0]:.2f} steps"
    return None


def _steps(answer):
    return number(answer, 3.9, 4.1, "127 steps reach the outlier: how long is one of them?", "steps")


def _spared(answer):
    layers = quantization.explain(attention.fuse_qkv(models.load("pocket")))
    right = {}
    for layer in layers:
        if layer.rule:
            right[layer.rule.name] = right.get(layer.rule.name, 0) + layer.inputs * layer.outputs
    said = answer(layers)
    if not isinstance(said, dict):
        return f"return a dict, not {type(said).__name__}"
    if set(said) != set(right):
        return f"its keys should be the rules' names, {', '.join(sorted(right))}, not {', '.join(map(str, said))}"
    wrong = [name for name in right if said[name] != right[name]]
    return f"'{wrong[0]}' spares {right[wrong[0]]} multiplications a row, not {said[wrong[0]]}" if wrong else None


EXERCISES = {"06.1": _quantise, "06.2": _steps, "06.3": _spared}
