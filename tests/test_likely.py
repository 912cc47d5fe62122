"""The likely reason why a step is worth less or more here than elsewhere, on made-up machines."""

import pytest
from made_up import kernels, row
from test_yours import A100, CPU, T4

from sdopt import likely, path, yours
from sdopt.bench import notes
from sdopt.roofline import Ceilings

P100 = yours.Machine("Tesla P100", (6, 0), "float16", Ceilings({"float32": 8e12, "float16": 10e12}, 5e11, 9e-6))


def taken(step, *rows, machine=None):
    """The reasons for `step`: `rows` are (row before, row) here and, if there are four, on a recorded machine."""
    mine = [dict(r) for r in rows[:2]]
    recorded = [("there", dict(r)) for r in rows[2:]]
    return [line for line in likely.reasons(yours.beside(mine, recorded), machine) if line.startswith(f"{step}:")]


def rows(step, before_s, after_s, before=None, **more):
    return row(before or path.step_before(step), before_s), row(step, after_s, **more)


def at_work(share, seconds):
    """What a profile says where the GPU's kernels are busy for a share of the UNet's time, of a row of so many seconds."""
    return {"unet_kernels": [kernels(2, share * seconds * 850 / 30)]}


def why(step, here, there, machine):
    """The one reason for `step`: `here` and `there` are seconds before and after it, and what else its row has."""
    pairs = [rows(step, *seconds, **(more[0] if more else {})) for *seconds, more in ((*h[:2], h[2:]) for h in (here, there))]
    said = taken(step, *pairs[0], *pairs[1], machine=machine)
    assert len(said) == 1
    return said[0]


def test_a_step_that_gains_as_much_as_elsewhere_needs_no_reason():
    assert taken("bf16", *rows("bf16", 4.0, 2.0), *rows("bf16", 40.0, 20.5), machine=T4) == []


def test_both_gains_are_told_with_their_machines():
    said = why("bf16", (4.0, 3.0), (4.0, 1.0), CPU)
    assert said.startswith("bf16: 1.33x here, 4.00x on there. Measured: ") and said.count("likely") == 1


def test_the_reason_is_sought_on_the_machine_that_differs_most():
    recorded = [(name, r) for name, s in (("a", 1.5), ("b", 1.0), ("c", 1.8)) for r in rows("dpm_20", 2.0, s)]
    (said,) = likely.reasons(yours.beside(list(rows("dpm_20", 2.0, 1.9)), recorded), CPU)
    assert "1.05x here (within the spread), 1.33x on a, 2.00x on b, 1.11x on c" in said and said.endswith("(there: b)")


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_row_that_waited_for_its_cpu_is_told_before_any_other_reason(where):
    """Kernels as long as before, and calls that took longer."""
    calm = rows("cfg_cutoff", 2.0, 1.5)
    waited = [r | {"unet_kernels": [kernels(2, 20.0)]} for r in rows("cfg_cutoff", 1.0, 1.6)]
    here, there = (waited, calm) if where == "here" else (calm, waited)
    (said,) = taken("cfg_cutoff", *here, *there, machine=A100)
    told = {"here": "Measured: its kernels", "there": "Measured there: its kernels"}[where]
    assert f"{told} are busy for 600 ms of the UNet's 1360, and were for 600 of 850: the GPU waits for the CPU" in said


def test_half_precision_without_a_unit():
    assert "1.1 times as fast in bfloat16 as in float32 here; likely no unit" in why("bf16", (4.0, 4.0), (4.0, 1.0), CPU)
    told = why("bf16", (4.0, 3.0), (4.0, 1.0), P100)
    assert "float16" in told and "compute capability 6.0 has no tensor cores (from 7.0), likely no unit" in told


def test_a_gain_over_a_row_that_waited_is_partly_its_wait():
    calm = rows("dpm_20", 2.0, 1.5)
    there = [r | {"unet_kernels": [kernels(2, 20.0)]} for r in rows("dpm_20", 2.0, 0.8)]
    (said,) = taken("dpm_20", *calm, *there, machine=CPU)
    assert "Measured there: kernels are busy for 600 ms of the UNet's 1700 in the row before it, which waited" in said
    fewer_launches = [r | {"unet_kernels": [kernels(2, 20.0)]} for r in rows("sdpa", 2.0, 0.8)]
    assert "which waited" not in taken("sdpa", *rows("sdpa", 2.0, 1.5), *fewer_launches, machine=CPU)[0]


def test_a_reader_without_a_gpu_is_told_where_the_recorded_one_waits():
    said = why("bf16", (4.0, 1.0), (4.0, 3.0, at_work(0.1, 3.0)), CPU)
    assert "Measured there: the GPU's kernels are busy for 10% of the UNet's time; likely it waits for launches" in said


def test_half_precision_with_a_unit_that_launches_keep_waiting():
    told = why("bf16", (4.0, 3.0, at_work(0.4, 3.0)), (4.0, 1.0, at_work(1.0, 1.0)), A100)
    assert "busy for 40% of the UNet's time here; likely it waits for launches" in told
    told = why("bf16", (4.0, 3.0, at_work(0.97, 3.0)), (4.0, 1.0, at_work(1.0, 1.0)), A100)
    assert "13.2 times as fast in bfloat16" in told and "waits" not in told and "likely layers this small" in told


def test_half_precision_gains_more_where_the_baseline_has_no_tf32_or_the_recorded_gpu_waits():
    told = why("bf16", (40.0, 8.0, at_work(1.0, 8.0)), (1.3, 0.9, at_work(0.58, 0.9)), T4)
    assert "compute capability 7.5 has no TF32 (from 8.0), so likely the baseline's convolutions" in told
    assert told.endswith("busy for 100% of the UNet's time here and 58% there; likely launches hide there what the step saves")
    told = why("bf16", (4.0, 1.0, at_work(1.0, 1.0)), (1.3, 0.9, at_work(0.58, 0.9)), A100)
    assert "busy for 100% of the UNet's time here and 58% there; likely launches hide there" in told


def test_attention_needs_its_kernels():
    assert "need 8.0, this is compute capability 7.5; likely" in why("sdpa", (4.0, 3.9), (4.0, 2.0), T4)
    assert notes.REASONS["sdpa"]["cpu"] in why("sdpa", (4.0, 3.9), (4.0, 2.0), CPU)
    assert notes.REASONS["sdpa"]["cuda"] in why("sdpa", (4.0, 3.9), (4.0, 2.0), A100)


def test_the_compiler_saves_little_where_the_gpu_does_not_wait_and_much_where_it_does():
    def compiled(here_busy, here_s, there_busy, there_s):
        made = [row("sdpa", 4.0, **at_work(here_busy, 4.0)), row("compile", here_s)]
        made += [row("sdpa", 4.0, **at_work(there_busy, 4.0)), row("compile", there_s)]
        return taken("compile", *made, machine=T4)[0]

    told = compiled(0.98, 3.5, 0.45, 1.1)
    assert "busy for 98% of the UNet's time here and 45% there, before the step; likely launches are what it saves, and" in told
    told = compiled(0.30, 0.9, 0.95, 3.5)
    assert "busy for 30%" in told and told.endswith("likely launches are what it saves")
    assert "so there are launches to save; likely what else" in compiled(0.40, 3.5, 0.45, 1.1)
    assert compiled(0.98, 1.1, 0.45, 3.5).endswith("Nothing that was measured here says why")
    assert notes.REASONS["compile"]["cpu"] in why("compile", (4.0, 3.9), (4.0, 2.0), CPU)


def test_whole_numbers_by_the_rate_of_their_products():
    told = why("int8", (4.0, 5.0), (4.0, 2.0), CPU)
    assert "0.9 times as fast in int8 as in bfloat16 here; likely rounding the inputs takes more than the products save" in told
    assert "came with 7.5, this is compute capability 6.0; likely" in why("int8", (4.0, 5.0), (4.0, 2.0), P100)
    assert "None of its layers was rounded" in why("int8", (4.0, 4.0, {"as_run": {"int8_layers": 0}}), (4.0, 2.0), A100)


def test_whole_numbers_that_were_not_tried_have_an_outlook():
    there = [("a", r) for r in rows("int8", 4.0, 4.4)]
    said = lambda machine: likely.reasons(yours.beside(list(rows("bf16", 4.0, 2.0)), there), machine)
    assert said(T4) == [
        "int8: not taken here, 0.91x on a. Measured: a large product is 1.6 times as fast in int8 as in float16 here; it may "
        "be worth a try"
    ]
    assert "likely nothing is to be gained" in said(A100)[0] and "likely nothing is to be gained" in said(P100)[0]


def test_a_cpu_without_instructions_for_16_bits_is_told_so_and_whole_numbers_are_held_against_float32():
    old = yours.Machine("old CPU", None, "bfloat16", Ceilings({"float32": 90e9, "bfloat16": 1.2e9, "int8": 3e9}, 2e10, 3e-6))
    told = why("bf16", (4.0, 5.0), (4.0, 3.0), old)
    assert "takes 75.0 times as long in bfloat16 as in float32 here; likely no unit" in told
    there = [("a", r) for r in rows("int8", 4.0, 4.4)]
    told = likely.reasons(yours.beside(list(rows("bf16", 4.0, 5.0)), there), old)
    assert "takes 30.0 times as long in int8 as in float32 here; likely nothing is to be gained" in told[-1]


def test_a_smaller_decoder_gains_by_the_share_of_decoding():
    def decoding(seconds, vae, tiny):
        stages = {"text_encoder": 0, "unet": 1e3 * seconds - vae, "unet_calls": 30, "scheduler": 0, "vae": vae}
        after = seconds - (vae - tiny) / 1e3
        return row("int8", seconds, stages_ms=stages), row("tiny_vae", after, stages_ms=stages | {"vae": tiny})

    told = taken("tiny_vae", *decoding(10.0, 500, 50), *decoding(1.0, 400, 20), machine=T4)[0]
    assert "decoding took 5% here and 40% there of the row before and became 10.0 times as fast here and 20.0 times" in told
    assert told.endswith("which alone makes 1.05x here and 1.61x there")
    other = decoding(1.0, 400, 20)
    other[1]["latency_s"] |= dict.fromkeys(("median", "p20", "p80"), 0.97)
    told = taken("tiny_vae", *decoding(10.0, 3000, 50), *other, machine=T4)[0]
    assert "1.42x here and 1.61x there, so it is not the reason" in told


def test_fewer_steps_are_the_same_everywhere():
    def steps(unet, rest, calls=20):
        stages = {"text_encoder": 0, "unet": unet, "unet_calls": 30, "scheduler": 0, "vae": rest}
        after = stages | {"unet": unet * calls / 30, "unet_calls": calls}
        seconds = [(part["unet"] + rest) / 1e3 for part in (stages, after)]
        return row("tiny_vae", seconds[0], stages_ms=stages), row("dpm_20", seconds[1], stages_ms=after)

    told = taken("dpm_20", *steps(1000, 1000), *steps(1900, 100), machine=A100)[0]
    assert "the UNet took 50% here and 95% there of the row before and has 20 calls for 30, which alone makes 1.20x here" in told
    assert "less work cannot take longer" in why("dpm_20", (2.0, 2.3), (2.0, 1.3), A100)


def test_half_a_batch_where_the_machine_is_not_full_and_where_it_waits():
    def cut(seconds, gain, **more):
        old, new = rows("cfg_cutoff", seconds, seconds / gain, **more)
        new["stages_ms"] |= {"unet_calls": 20}
        return old, new

    told = taken("cfg_cutoff", *cut(2.0, 1.05), *cut(2.0, 1.4), machine=CPU)[0]
    assert "1.05x here and 1.40x there as fast, and 1.43x if half a batch took half the time; likely" in told
    assert told.endswith("leaves more of this machine idle")
    told = taken("cfg_cutoff", *cut(2.0, 1.05, **at_work(0.4, 1.9)), *cut(2.0, 1.4), machine=A100)[0]
    assert "likely it waits for launches, which this step makes no fewer" in told


def test_what_comes_after_the_compiler_there_and_not_here_is_told():
    mine = [row(i, s) for i, s in (("sdpa", 4.0), ("tiny_vae", 3.9), ("compile", 3.0))]
    theirs = [("a", row(i, s)) for i, s in (("sdpa", 4.0), ("compile", 1.0), ("tiny_vae", 0.8))]
    said = likely.reasons(yours.beside(mine, theirs), CPU)
    assert said[0].startswith("compile: 1.30x here, 4.00x on a")
    assert said[0].endswith("(and here it comes after tiny_vae, there before them)")
    assert said[1].startswith("tiny_vae") and said[1].endswith("(and there it comes after the compiler)")
    mine = [row(i, s) for i, s in (("sdpa", 4.0), ("compile", 3.0), ("tiny_vae", 2.95))]
    same = likely.reasons(yours.beside(mine, theirs), CPU)
    assert not any("comes after" in line for line in same)


def test_a_restless_machine_is_told_to_measure_again():
    here = list(rows("bf16", 4.0, 3.0))
    here[1]["latency_s"] |= {"p20": 2.7, "p80": 3.3}
    assert taken("bf16", *here, *rows("bf16", 4.0, 1.0), machine=CPU)[0].endswith(
        "But p80 is 1.22 times p20 here: measure again with nothing else running"
    )


def test_a_step_that_does_not_help_has_a_reason_where_nothing_is_recorded():
    said = likely.reasons(yours.beside(list(rows("fused_qkv", 4.0, 4.0)), []), CPU)
    assert said == [f"fused_qkv: 1.00x here (within the spread). Likely because {notes.REASONS['fused_qkv']['cpu']}"]
    assert likely.reasons(yours.beside(list(rows("fused_qkv", 4.0, 2.0)), []), CPU) == []


@pytest.mark.parametrize("machine", [T4, A100, CPU, P100], ids=lambda machine: machine.name)
@pytest.mark.parametrize("step", list(notes.REASONS))
@pytest.mark.parametrize(("here", "there"), [(1.0, 3.0), (3.0, 1.0), (0.5, 3.0), (3.0, 0.5)])
def test_every_step_has_a_reason_on_every_machine(machine, step, here, there):
    said = why(step, (4.0, 4.0 / here), (4.0, 4.0 / there), machine)
    assert said.startswith(f"{step}: {here:.2f}x here") and len(said) < 420
    assert all(word not in said for word in ("{", "None", "nan"))


def test_the_compilers_first_call_is_paid_back_or_never():
    mine = [row("sdpa", 2.0, first_call_s=3.0), row("compile", 1.0, first_call_s=103.0)]
    calls = {"cold_s": 63.0, "warm_s": 12.0, "found": 0, "compiled": 2}
    theirs = [("a", row("sdpa", 2.0, first_call_s=3.0)), ("a", row("compile", 1.0, first_call_s=12.0, first_calls=calls))]
    said = likely.paid_back(yours.beside(mine, [*theirs, ("b", mine[0]), ("b", row("compile", 2.5))]))
    assert said == [
        "compile: its first call took 103 s here, 3.00 s without it. Paid back after 101 pictures here, after 61 pictures on a, "
        "never on b"
    ]
    assert likely.paid_back(yours.beside(list(rows("bf16", 4.0, 2.0)), [])) == []
