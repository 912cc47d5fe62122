"""A reader's steps beside recorded ones: what is compared with what, how it reads, and what can be told of a machine."""

import math

import pytest
import torch
from made_up import IDS, result, row, run_folder

from sdopt import drawing, likely, models, path, yours
from sdopt.errors import UserError
from sdopt.roofline import Ceilings

T4 = yours.Machine("Tesla T4", (7, 5), "float16", Ceilings({"float32": 4e12, "float16": 25e12, "int8": 40e12}, 2.4e11, 9e-6))
A100 = yours.Machine(
    "NVIDIA A100", (8, 0), "bfloat16",
    Ceilings({"float32": 19e12, "TF32": 120e12, "bfloat16": 250e12, "int8": 330e12}, 1.4e12, 6e-6),
)  # fmt: skip
CPU = yours.Machine("Some CPU", None, "bfloat16", Ceilings({"float32": 1e11, "bfloat16": 1.1e11, "int8": 1e11}, 1e10, 2e-6))


def ladder(**seconds):
    return [row(step, s) for step, s in seconds.items()]


def there(*machines, **seconds):
    return [(machine, r) for machine in machines for r in ladder(**seconds)]


def test_each_step_is_held_against_the_row_before_it_and_all_against_the_first():
    mine = ladder(baseline_fp32=8.0, bf16=4.0, dpm_20=2.0, compile=1.6)
    lines = yours.beside(mine, there("a", baseline_fp32=3.0, bf16=2.0, compile=1.0, int8=1.25, dpm_20=0.5))
    gains = {line.step: (line.mine and line.mine.gain["speedup"], line.recorded["a"].gain["speedup"]) for line in lines}
    assert gains == {
        "bf16": (2.0, 1.5),
        "compile": (1.25, 2.0),
        "int8": (None, 0.8),
        "dpm_20": (2.0, 2.5),
        yours.ALL: (5.0, 6.0),
    }
    compiled = next(line for line in lines if line.step == "compile")
    assert compiled.mine.after == ("baseline_fp32", "bf16", "dpm_20"), "in the order they were taken"
    assert math.prod(line.mine.gain["speedup"] for line in lines[:-1] if line.mine) == gains[yours.ALL][0]


@pytest.mark.parametrize(
    ("seconds", "reads"), [(2.0, "like"), (1.85, "like"), (2.15, "like"), (1.8, "more"), (2.25, "less"), (9.0, "less")]
)
def test_a_gain_reads_less_or_more_only_beyond_a_tenth(seconds, reads):
    mine, theirs = ladder(baseline_fp32=4.0, bf16=seconds), there("a", baseline_fp32=40.0, bf16=20.0)
    for r in (*mine, *(r for _, r in theirs)):
        r["latency_s"] |= dict.fromkeys(("p20", "p80"), r["latency_s"]["median"])
    assert yours.beside(mine, theirs)[0].reads("a") == reads


def test_a_gain_within_the_spread_reads_like_however_large_the_difference():
    mine = ladder(baseline_fp32=4.0, bf16=2.0)
    mine[1]["latency_s"] |= {"p20": 0.9, "p80": 5.0}
    assert yours.beside(mine, there("a", baseline_fp32=4.0, bf16=1.0))[0].reads("a") == "like"


def test_rows_beside_the_path_and_rows_that_failed_are_no_steps():
    mine = [*ladder(baseline_fp32=4.0, bf16=2.0), row("recommended", 0.1), row("baseline_tf32", 3.0)]
    assert [line.step for line in yours.beside(mine, [])] == ["bf16", yours.ALL]


def test_the_table_has_a_column_a_machine_and_says_what_was_not_taken():
    recorded = there("a", baseline_fp32=4.0, bf16=1.0, int8=1.0) + there("b", baseline_fp32=4.0, bf16=2.0)
    table = yours.table(yours.beside(ladder(baseline_fp32=4.0, bf16=2.0), recorded)).splitlines()
    assert table[0].count("recorded: ") == 2 and "recorded: a | recorded: b" in table[0]
    assert table[2] == "| bf16 | 2.00 s | 2.00x | 4.00x | 2.00x | less than on a, as on b |"
    assert table[3] == "| int8 | not taken |  | 1.00x (within the spread) |  |  |"


@pytest.mark.parametrize("machines", [(), ("a",), ("a", "b")])
def test_the_figure_has_a_bar_a_gain_that_starts_at_one(machines):
    mine = ladder(baseline_fp32=4.0, bf16=5.0, sdpa=1.0)
    lines = yours.beside(mine, there(*machines, baseline_fp32=4.0, bf16=2.0))
    figure = yours.gains_figure(lines)
    ends = [(bar.get_x(), bar.get_x() + bar.get_width(), bool(bar.get_hatch())) for bar in figure.axes[0].patches]
    gains = [(taken.gain["speedup"], k > 0) for line in lines for k, taken in enumerate((line.mine, *line.recorded.values()))]
    assert [(1, pytest.approx(gain), hatched) for gain, hatched in gains] == ends
    assert [text.get_text() for text in figure.axes[0].texts].count("not recorded") == len(machines)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_short_picture_is_reckoned_up_to_a_whole_one():
    latency = {"median": 1.5, "p20": 1.5, "p80": 1.5, "runs": [1.5, 1.7, 1.6]}
    stages = {"text_encoder": 200.0, "unet": 500.0, "unet_calls": 5, "scheduler": 10.0, "vae": 300.0}
    whole = yours.stretched({"latency_s": latency, "stages_ms": stages, "first_call_s": 3.0}, 30)
    assert whole["latency_s"]["runs"] == pytest.approx([0.5 + 6 * 1.0, 0.5 + 6 * 1.2, 0.5 + 6 * 1.1])
    assert whole["latency_s"]["median"] == pytest.approx(7.1) and whole["first_call_s"] == 3.0
    assert whole["stages_ms"] == {"text_encoder": 200.0, "unet": 3000.0, "unet_calls": 30, "scheduler": 60.0, "vae": 300.0}


def test_a_priced_row_has_what_a_measured_one_has(pocket):
    pipe, call = path.prepare(pocket, ["bf16", "dpm_20"])
    task = drawing.task(models.MODELS["pocket"], runs=2)
    with torch.no_grad():
        made = yours.priced("dpm_20", pipe, task, call, steps=2)
    assert made["id"] == "dpm_20" and made["status"] == "ok" and len(made["latency_s"]["runs"]) == 2
    assert made["stages_ms"]["unet_calls"] == 20 and "unet_kernels" not in made
    assert yours.beside([row("bf16", 1e6), made], [])[0].mine.gain["speedup"] > 1


def test_a_walk_of_ones_own_must_be_of_the_same_model(tmp_path):
    made = result()
    made["rows"][1] = {"id": "bf16", "label": "bf16", "settings": {}, "status": "failed: no bf16"}
    file = run_folder(tmp_path, made) / "pocket-path.json"
    assert [r["id"] for r in yours.walked(file, "pocket")] == [i for i in IDS if i != "bf16"]
    with pytest.raises(UserError, match="is a path of pocket: give one of sdxl"):
        yours.walked(file, "sdxl")
    with pytest.raises(UserError, match="cannot read"):
        yours.walked(tmp_path / "none.json", "pocket")


def test_what_a_machine_can_do_is_told_by_its_capability_and_its_rates(monkeypatch):
    assert [T4.has(unit) for unit in yours.UNITS] == [True, True, False, False]
    assert [A100.has(unit) for unit in yours.UNITS] == [True, True, True, False]
    assert CPU.has("tensor cores") is None and (T4.kind, CPU.kind) == ("cuda", "cpu")
    assert T4.faster("float16") == 6.25 and T4.faster("bfloat16") is None and CPU.faster("int8", "bfloat16") < 1
    assert "bf16 and TF32 no (from 8.0), fp8 no (from 8.9)" in yours.facts(T4)[1]
    assert len(yours.facts(CPU)) == 2 and "bfloat16 0.11" in yours.facts(CPU)[1]


def test_this_machine_is_measured_in_the_formats_it_has(monkeypatch):
    asked = []
    monkeypatch.setattr(yours.roofline, "ceilings", lambda device, formats, *sizes: asked.append(formats) or CPU.ceilings)
    assert yours.machine("cpu").capability is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(yours.results, "environment", lambda device: {"gpu": "some GPU", "cpu": "some CPU"})
    for capability, half in (((6, 0), "float16"), ((7, 5), "float16"), ((9, 0), "bfloat16")):
        assert yours.machine("cuda").half == half
    cpu = {"float32", "bfloat16", "int8"}
    assert asked == [cpu, {"float32", "float16"}, {"float32", "float16", "int8"}, cpu | {"TF32"}]


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_of_both_batches_are_seen(pocket):
    pipe, call = path.prepare(pocket.to("cuda"), ["bf16", "dpm_20", "cfg_cutoff"])
    task = drawing.task(models.MODELS["pocket"], runs=2)
    with torch.no_grad():
        made = yours.priced("cfg_cutoff", pipe, task, call) | {"settings": {"cutoff": path.Options().cutoff}}
    assert {call["samples"] for call in made["unet_kernels"]} == {1, 2} and 0 < likely.busy(made) < 1.1
    found = yours.machine("cuda")
    assert found.capability and found.faster(found.half) > 0 and len(yours.facts(found)) == 3
