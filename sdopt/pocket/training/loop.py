"""One training loop for every stage: AdamW, warm-up and cosine, EMA, checkpoints that resume, a log."""

import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from sdopt.results import write_json

WARM_UP = 0.03  # share of the steps
SAVE_EVERY_S = 60


def read_log(work: Path) -> dict:
    path = work / "training.json"
    return json.loads(path.read_text()) if path.exists() else {"stages": {}}


def write_log(work: Path, stage: str, entry: dict) -> None:
    """Put a stage's entry into `training.json`, all stages' common log."""
    log = read_log(work)
    log["stages"][stage] = entry
    write_json(work / "training.json", log)


def fit(
    stage: str,
    modules: nn.ModuleDict,
    draw,
    loss,
    *,
    steps: int,
    batch: int,
    lr: float,
    work: Path,
    ema: float = 0.999,
    seed: int = 0,
    compiled: bool = True,
    minutes: float = math.inf,
) -> None:
    """Train `modules` in place and leave their exponential moving average in them.

    `draw(generator)` gives one batch of tensors, `loss(*batch)` the loss to minimise. Every step's generator is seeded
    from `seed` and the step, so a run that was killed goes on as if it had not been. bf16 autocast; weights, moments and
    EMA in fp32. Checkpoints are safetensors: `work/<stage>.safetensors`. Ends after `steps` or `minutes`, whichever
    comes first; the learning rate has then come down to zero either way.
    """
    device = next(modules.parameters()).device
    named = dict(modules.named_parameters())
    parameters = list(named.values())
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    for p in parameters:  # so that a checkpoint can be read into the moments before the first step
        optimiser.state[p] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    path = work / f"{stage}.safetensors"
    entry = {
        "settings": {
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "ema": ema,
            "seed": seed,
            "minutes": None if math.isinf(minutes) else minutes,
        },
        "parameters": sum(p.numel() for p in parameters),
        "seconds": 0.0,
        "points": [],
    }
    first = 0

    def state(step: int) -> dict[str, torch.Tensor]:
        out = {"step": torch.tensor(step)}
        for (name, p), mean in zip(named.items(), average):
            moments = optimiser.state[p]
            out |= {
                f"weight.{name}": p.detach(),
                f"ema.{name}": mean,
                f"first.{name}": moments["exp_avg"],
                f"second.{name}": moments["exp_avg_sq"],
            }
        return out

    if path.exists():
        saved = load_file(path, device=str(device))
        first = int(saved["step"])
        with torch.no_grad():
            for (name, p), mean in zip(named.items(), average):
                p.copy_(saved[f"weight.{name}"])
                mean.copy_(saved[f"ema.{name}"])
                optimiser.state[p]["exp_avg"].copy_(saved[f"first.{name}"])
                optimiser.state[p]["exp_avg_sq"].copy_(saved[f"second.{name}"])
                optimiser.state[p]["step"].fill_(first)
        entry = read_log(work)["stages"].get(stage, entry)

    def save(step: int) -> None:
        part = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in state(step).items()}, part)
        os.replace(part, path)
        write_log(work, stage, entry)

    run = torch.compile(loss) if compiled else loss
    generator = torch.Generator(device)
    started = saved_at = time.perf_counter()
    before = entry["seconds"]
    every = max(1, steps // 100)
    total, counted, since = torch.zeros((), device=device), 0, time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage, mininterval=2)
    step = first
    for step in bar:
        progress = max(step / steps, (before + time.perf_counter() - started) / (60 * minutes))
        if progress >= 1:
            steps = step
            break
        rate = lr * min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate
        tensors = draw(generator.manual_seed(seed * 10_000_019 + step))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = run(*tensors)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        total += value.detach()
        counted += 1
        if (step + 1) % every == 0 or step + 1 == steps:
            now, mean = time.perf_counter(), total.item() / counted
            point = {
                "step": step + 1,
                "loss": round(mean, 6),
                "images_per_s": round(counted * batch / (now - since), 1),
                "lr": round(rate, 9),
            }
            entry["points"].append(point)
            entry["seconds"] = before + now - started
            bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{point['images_per_s']:.0f}")
            if not math.isfinite(mean):
                raise SystemExit(
                    f"{stage}: the loss is {mean} at step {step + 1}; lower --lr and start again from the last checkpoint"
                )
            total.zero_()
            counted, since = 0, now
        if time.perf_counter() - saved_at > SAVE_EVERY_S and math.isfinite(value.item()):
            step += 1
            save(step)
            saved_at = time.perf_counter()
    step = steps
    save(step)
    with torch.no_grad():
        for p, mean in zip(parameters, average):
            p.copy_(mean)
