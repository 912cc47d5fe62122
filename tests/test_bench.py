import io
import multiprocessing
import os
import signal
import time
from multiprocessing import resource_tracker

import numpy as np
import pytest
from made_up import row as made_up_row
from tqdm import tqdm

from sdopt import models, results
from sdopt.bench import notes, process, studies, walk
from sdopt.bench.judge import Judge
from sdopt.drawing import noise
from sdopt.errors import UserError
from sdopt.path import STEPS

CPU = process.context("cpu")


def answer(state, tell, job):
    tell("thinking")
    state["count"] = state.get("count", 0) + 1
    return state["count"]


def fail(state, tell, job):
    raise ArithmeticError("not finite\nand a second line")


def refuse(state, tell, job):
    raise UserError("give another folder")


def die(state, tell, job):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(state, tell, job):
    os._exit(3)


def hang(state, tell, job):
    time.sleep(60)


def call(function, limit_s=60.0, on_phase=lambda phase: None):
    with process.Fresh(CPU, ahead=False) as fresh:
        return fresh.call(function, "job", on_phase=on_phase, limit_s=limit_s)


def test_every_call_starts_from_a_clean_process_and_tells_its_phases():
    phases = []
    assert [call(answer, on_phase=phases.append) for _ in range(2)] == [1, 1]
    assert phases == ["thinking"] * 2


def test_a_worker_keeps_its_state_and_outlives_what_it_was_refused():
    with process.Worker(CPU) as worker:
        assert worker.call(answer, "job") == 1
        with pytest.raises(process.RowFailed, match="ArithmeticError"):
            worker.call(fail, "job")
        with pytest.raises(UserError):
            worker.call(refuse, "job")
        assert worker.call(answer, "job") == 2
        with pytest.raises(process.RowFailed, match="SIGKILL"):
            worker.call(die, "job")
        with pytest.raises(process.RowFailed, match="SIGKILL"):
            worker.call(answer, "job")


def answer_late(state, tell, job):
    tell("timing")
    tell(process.KEEPING)
    return "done"


def test_the_next_worker_is_started_once_the_timing_is_over_and_none_is_left_behind():
    seen = []
    with process.Fresh(CPU, ahead=True) as fresh:
        assert fresh.call(answer_late, "job", on_phase=lambda phase: seen.append((phase, [*fresh._waiting]))) == "done"
        assert [phase for phase, _ in seen] == ["timing", process.KEEPING] and not seen[0][1]
        (waiting,) = seen[1][1]
        assert waiting._process.is_alive()
        with fresh.take() as worker:
            assert worker is waiting and worker.call(answer, "job") == 1
        fresh.call(answer_late, "job")
        last = fresh._waiting[0]._process
    assert not last.is_alive() and not waiting._process.is_alive()


def test_workers_that_are_started_together_are_taken_one_after_another(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with process.Fresh(CPU, ahead=True) as fresh:
        fresh.start_next(2)
        two = [*fresh._waiting]
        fresh.start_next(5)
        assert len(fresh._waiting) == 3 and fresh._waiting[:2] == two, "no more than cores"
        fresh.start_next()
        with fresh.take() as worker:
            assert worker is two[0] and len(fresh._waiting) == 2
        left = [*fresh._waiting]
    assert not any(worker._process.is_alive() for worker in (*two, *left))
    with process.Fresh(CPU, ahead=False) as fresh:
        fresh.start_next(2)
        assert not fresh._waiting, "forked in no time"


def test_a_worker_ends_in_the_middle_of_its_call_when_its_caller_is_killed():
    with process.Worker(CPU) as caller:
        with pytest.raises(process.RowFailed, match="SIGKILL"):
            caller.call(start_a_worker_and_be_killed, on_phase=(told := []).append)
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{told[0]}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{told[0]}"), "the worker outlived its caller"


def draw_a_bar(state, tell):
    left = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource_tracker, "register", lambda name, kind: left.append(kind))
        with tqdm(total=1, file=io.StringIO()):
            return left


def test_a_bar_in_a_worker_makes_no_semaphore_that_would_be_left_behind_when_it_is_stopped():
    with process.Worker(CPU) as worker:
        assert worker.call(draw_a_bar) == []


def start_a_worker_and_be_killed(state, tell):
    multiprocessing.process.current_process()._config["daemon"] = False  # so that it may have children
    worker = process.Worker(CPU)
    worker._here.send((hang, ("job",)))
    tell(worker._process.pid)
    time.sleep(1)
    die(state, tell, "job")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (fail, "^ArithmeticError: not finite$"),
        (die, "^killed by SIGKILL, perhaps for want of memory$"),
        (leave, "^its process ended with exit code 3$"),
    ],
)
def test_whatever_becomes_of_the_process_there_is_a_reason(function, why):
    with pytest.raises(process.RowFailed, match=why):
        call(function)


def test_a_process_that_hangs_is_ended():
    start = time.monotonic()
    with pytest.raises(process.RowFailed, match="stopped after 1 s"):
        call(hang, limit_s=1.0)
    assert time.monotonic() - start < 30


def test_bad_input_found_in_the_process_is_bad_input_here():
    with pytest.raises(UserError, match="give another folder"):
        call(refuse)


# A walk over made-up measurements: the second row dies, the third raises.
SECONDS = {1: 4.0, 4: 1.0, 5: 1.01, 6: 2.02}


def pretend(state, tell, job):
    n = len(job.recipe.steps)
    if n == 2:
        die(state, tell, job)
    if n == 3 and job.recipe.id != "channels_last":
        fail(state, tell, job)
    numbers = made_up_row(job.recipe.steps[-1], SECONDS.get(n, 0.5))
    numbers = {key: numbers[key] for key in ("latency_s", "first_call_s", "peak_memory_bytes", "stages_ms", "as_run")}
    drawn_with = {
        "steps": min(20, job.steps) if n >= 8 else job.steps,
        "guidance_scale": job.guidance_scale,
        "scheduler": "euler",
    }
    shape = (len(job.prompts[0]), job.height, job.width, 3)
    images = [np.full(shape, 10 * n, np.uint8) for _ in job.prompts]
    if n == 9:
        drawn_with |= {"cutoff": 0.4}
    return {**numbers, "drawn_with": drawn_with}, images


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def walked(out):
    (out / "pocket-path").mkdir()
    (out / "pocket-path" / "2-bf16.png").write_bytes(b"of an earlier run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "measure", pretend)
        shared = studies.settings("pocket", runs=2, height=64, width=64)
        return walk.walk(shared, studies.nine(shared["steps"]), "cpu", out)


def test_a_walk_goes_on_after_failed_rows_and_writes_what_it_returns(walked, out):
    assert [row["id"] for row in walked["rows"]] == [step.id for step in STEPS]
    status = {row["id"]: row["status"] for row in walked["rows"]}
    assert status.pop("bf16") == "failed: killed by SIGKILL, perhaps for want of memory"
    assert status.pop("sdpa") == "failed: ArithmeticError: not finite"
    assert set(status.values()) == {"ok"}
    assert results.read(out / "pocket-path.json") == walked
    assert walked["settings"]["prompts"][0] == walked["settings"]["prompt"]


def test_every_measured_row_has_its_picture_and_no_failed_row_an_old_one(walked, out):
    pictures = {path.name for path in (out / "pocket-path").glob("*.png")}
    numbered = enumerate((step.id for step in STEPS), 1)
    assert pictures == {f"{n}-{i}.png" for n, i in numbered if i not in ("bf16", "sdpa")}


def test_no_guidance_at_all_is_a_row_like_any_other(walked):
    """A cutoff at 0 draws at another guidance scale; that is what the step is about, so the rows still compare."""
    before, last = walked["rows"][-2:]
    never = {**last, "settings": {**last["settings"], "cutoff": 0.0, "guidance_scale": 1.0}}
    assert results.compare(never, before, about=notes.SUBJECTS)["speedup"] > 0
    assert notes.note(never, before, walked["settings"], "cpu").startswith("no clear difference")  # as made up


def test_the_recommended_path_has_a_picture_the_other_baselines_none():
    assert walk.image_name("recommended") == "10-recommended.png" and walk.image_name("bf16") == "2-bf16.png"
    assert "baseline_tf32" not in walk.PICTURED


def test_quality_compares_with_the_baseline_and_the_step_before(walked):
    quality = {row["id"]: row["quality"] for row in walked["rows"]}
    assert quality["bf16"] is None
    assert quality["baseline_fp32"]["against_baseline"] is None
    assert quality["compile"]["against_baseline"]["max_abs"] == 30
    assert quality["compile"]["against_previous"] is None, "the step before failed"
    assert quality["int8"]["against_previous"]["max_abs"] == 10
    assert quality["int8"]["objects"]["n"] >= 2


def test_rows_say_what_differs_and_what_did_not_help(walked):
    rows = {row["id"]: row for row in walked["rows"]}
    assert rows["compile"]["settings"] == {}
    assert rows["dpm_20"]["settings"] == {"steps": 20}
    assert rows["cfg_cutoff"]["settings"] == {"steps": 20, "cutoff": 0.4}
    assert rows["fused_qkv"]["note"].startswith("no clear difference from the step before (0.99x), likely because ")
    assert rows["int8"]["note"].startswith("slower than the step before (0.50x), likely because ")
    assert rows["tiny_vae"]["note"] is None
    assert rows["compile"]["apart"]["channels_last"]["latency_s"]["median"] == 0.5


def test_processes_for_a_gpu_are_not_forked():
    methods = [process.context(device).get_start_method() for device in ("cuda", "cuda:1", "cpu")]
    assert methods == ["spawn", "spawn", "forkserver"]


def test_every_step_has_a_reason_why_it_may_not_help():
    assert set(notes.REASONS) == {step.id for step in STEPS[1:]}
    assert all(reasons.keys() == {"cpu", "cuda"} for reasons in notes.REASONS.values())


@pytest.mark.parametrize(
    ("i", "more", "before", "said"),
    [
        ("tiny_vae", {}, {}, "likely because decoding was only 9% of the step before"),
        ("dpm_20", {}, {}, "likely because the step before took 12 steps, no more than this one"),
        ("dpm_20", {"settings": {"steps": 6}}, {}, "though it takes fewer steps: measure again"),
        ("cfg_cutoff", {"settings": {"cutoff": 0.9}}, {}, "and 90% of the steps keep the whole"),
        ("bf16", {}, {"latency_s": {"median": 1, "p20": 0.8, "p80": 1.2}}, "p80 is 1.50 times p20: measure again"),
    ],
)
def test_a_note_gives_a_reason_that_the_numbers_bear_out(i, more, before, said):
    rows = made_up_row(i, 1.0, **more), made_up_row("before", 1.0, **before)
    assert said in notes.note(*rows, {"steps": 12}, "cpu")


def test_int8_that_rounded_nothing_is_the_step_before_whatever_the_times_say():
    before = made_up_row("fused_qkv", 1.0)
    for seconds in (0.5, 2.0):
        same = made_up_row("int8", seconds, as_run={"int8_layers": 0})
        told = notes.note(same, before, {"steps": 12}, "cuda")
        assert told.endswith(
            f"none was rounded: {1 / seconds:.2f}x is the difference between two processes that do the same"
        )


def with_kernels(i, seconds, kernels_ms):
    return made_up_row(i, seconds, unet_kernels=[{"samples": 2, "ms": {"other": kernels_ms}}])


@pytest.mark.parametrize(
    ("kernels", "said"),
    [((1.0, 1.0), "busy for 30 ms of the UNet's 85, and were for 30 of 51: the GPU waits"), ((2.0, 1.0), "no longer fills")],
    ids=["as busy", "busier"],
)
def test_a_row_whose_kernels_took_no_longer_waited_for_the_cpu(kernels, said):
    row, before = with_kernels("cfg_cutoff", 0.1, kernels[0]), with_kernels("dpm_20", 0.06, kernels[1])
    assert said in notes.note(row, before, {"steps": 30}, "cuda")
    assert "waits" not in notes.note(with_kernels("cfg_cutoff", 0.062, 1.0), before, {"steps": 30}, "cuda")


def test_a_step_that_helps_needs_no_note():
    assert notes.note(made_up_row("bf16", 1.0), made_up_row("baseline_fp32", 2.0), {"steps": 12}, "cpu") is None


def test_noise_is_not_judged():
    judge = Judge(studies.settings("sdxl", "random", runs=2))
    assert judge.judge("bf16", [np.zeros((1, 8, 8, 3), np.uint8)]) is None


def test_prompts_and_seeds_are_the_same_for_every_row_and_differ_between_pictures():
    judge = Judge(studies.settings("pocket", runs=2, batch=3))
    assert [len(prompts) for prompts in judge.prompts] == [3, 3]
    assert len({prompt for prompts in judge.prompts for prompt in prompts}) == 6
    assert judge.seeds == ((0, 1, 2), (3, 4, 5))
    sd15 = Judge(studies.settings("sd15", runs=2))
    assert sd15.prompts == ((models.MODELS["sd15"].prompt,),) * 2


def test_noise_is_the_same_whatever_the_dtype_and_the_batch():
    pipe = models.load("pocket")
    full = noise(pipe, 64, 128, (0, 1))
    assert full.shape == (2, 4, 8, 16)
    half = noise(pipe.to(dtype := full.bfloat16().dtype), 64, 128, (1,))
    assert half.dtype == dtype
    assert (half[0] == full[1].to(dtype)).all()
