from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sdopt import path, profiling
from sdopt.bench import claims, row
from sdopt.errors import UserError
from sdopt.profiling import Profile


TASK = ("height", "width", "steps", "guidance_scale", "prompts", "seeds")


def job(steps, cache=None):
    task = {"height": 64, "width": 64, "steps": 4, "guidance_scale": 5.0, "prompts": (("a cube",),), "seeds": ((0,),)}
    recipe = row.Recipe("last", "last", steps)
    return row.Job(recipe, "sdxl", "random", "cpu", scheduler="euler", cache=cache, **task)


@pytest.fixture
def profiled(sdxl):
    """A function that prepares a pipeline by some steps and returns what a row says of its UNet."""

    def of(*steps):
        pipe, call_kwargs = path.prepare(sdxl, steps)
        return row.unet_profile(pipe, job(steps), call_kwargs)

    return of


def test_a_row_on_a_cpu_knows_who_attended_and_no_kernels(profiled):
    assert profiled("sdpa") == ({"attention": ["flash"]}, {})


def test_a_row_knows_the_kernels_of_each_batch_its_unet_sees(profiled, monkeypatch):
    times = iter((*[0.009] * 3, 0.004, *[0.008] * 5, 0.003))  # the last of each counts: the first have more to do

    def profile(call):
        call()
        return Profile(frozenset(("aten::mm",)), {"nvjet_sm90": next(times), "cudnn_sdpa_fprop": 0.001})

    monkeypatch.setattr(profiling, "profile", profile)
    attended, kernels = profiled("sdpa", "cfg_cutoff")
    assert attended == {"attention": ["cudnn"]}
    assert [call["samples"] for call in kernels["unet_kernels"]] == [2, 1]
    for call, product in zip(kernels["unet_kernels"], (4.0, 3.0), strict=True):
        assert call["ms"] == pytest.approx(
            {"attention": 1.0, "convolution": 0.0, "matrix product": product, "other": 0.0}
        )
        assert call["longest"] == {"matrix product": {"nvjet_sm90": product}, "attention": {"cudnn_sdpa_fprop": 1.0}}


def test_a_task_without_a_recipe_is_profiled_too(sdxl):
    """As `yours` does, in a notebook."""
    pipe, call_kwargs = path.prepare(sdxl, ("sdpa", "cfg_cutoff"))
    task = SimpleNamespace(**{name: getattr(job(()), name) for name in TASK})
    assert row.unet_profile(pipe, task, call_kwargs) == ({"attention": ["flash"]}, {})


def test_a_profiler_that_is_refused_costs_no_row(profiled, monkeypatch):
    def refuse(call):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(profiling, "profile", refuse)
    attended, kernels = profiled("sdpa")
    assert attended == {"attention": None, "attention_unknown": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}
    assert kernels == {}


def test_a_new_sizes_first_picture_is_timed_beside_its_second(sdxl, monkeypatch):
    drawn, seconds = [], iter((3.0, 0.5))
    monkeypatch.setattr(row.timing, "seconds_of", lambda call, device: (drawn.append(call()[0].size), next(seconds))[1])
    pipe, call_kwargs = path.prepare(sdxl, ("sdpa",))
    found = row.other_size(pipe, replace(job(("sdpa",)), height=128, steps=1), call_kwargs)
    assert found == {"height": 64, "width": 64, "first_s": 3.0, "second_s": 0.5} and drawn == [(64, 64)] * 2


def test_a_worker_that_gave_its_memory_back_draws_once_before_it_is_timed(monkeypatch):
    did, free = [], [90]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("gave back"))
    monkeypatch.setattr(row.timing, "seconds_of", lambda call, device: (did.append("timed"), call())[0])
    state = {"pipe": SimpleNamespace(device=torch.device("cuda")), "draw": lambda run: did.append(run)}
    drew = lambda run: (did.clear(), row.draw_timed(state, None, run), [*did])[-1]
    assert drew(0) == ["timed", 0]
    free[0] = 6
    assert drew(1) == ["timed", 1, "gave back"]
    free[0] = 13
    assert drew(2) == [2, "timed", 2] and drew(3) == ["timed", 3]
    row.give_back(state, None)
    assert drew(4) == [4, "timed", 4]
    state["pipe"].device = torch.device("cpu")
    did.clear()
    row.give_back(state, None)
    assert not did and "gave_back" not in state


@pytest.mark.parametrize(
    "left", [b"", b"no archive", bytes.fromhex("fd377a585a000004e6d6b446")], ids=["none", "else", "part"]
)
def test_a_damaged_cache_is_named_with_its_mend(tmp_path, left, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set by the row, put back after the test")
    one = job(("compile",), tmp_path)
    one.artifacts.write_bytes(left)
    with pytest.raises(UserError, match=r"sdxl-last.bin.xz is damaged: delete it"):
        row.prepare(one, lambda phase: None)


@pytest.mark.parametrize("search", [claims.ALONE, claims.LATER, claims.SHARED])
def test_what_was_compiled_is_exported_once_its_search_is_done(search, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(row, "prepare", lambda job, tell: (tell("preparing"), (SimpleNamespace(), {}))[1])
    monkeypatch.setattr(row.drawing, "drawer", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(row.drawing, "is_compiled", lambda pipe: True)
    monkeypatch.setattr(row, "keep_artifacts", exported.append)
    monkeypatch.setattr(claims, "processes", lambda: 3)
    one = replace(job(("compile",), tmp_path), cache=tmp_path, search=search, device="cpu")
    first = row.first_call({}, lambda phase: None, one)
    assert exported == ([one] if search == claims.ALONE else [])
    assert {key: first[key] for key in ("left", "processes") if key in first} == (
        {"left": [], "processes": 3} if search == claims.LATER else {}
    )


def test_what_a_first_call_waited_for_others_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(row, "prepare", lambda job, tell: (tell("preparing"), (SimpleNamespace(), {}))[1])
    monkeypatch.setattr(row.drawing, "drawer", lambda *_, **__: None)
    monkeypatch.setattr(row.drawing, "is_compiled", lambda pipe: True)
    monkeypatch.setattr(row.timing, "seconds_of", lambda draw, device: 7.0)
    monkeypatch.setattr(claims, "applied", lambda how, folder: nullcontext(claims.Search(waited=[2.0, 0.5])))
    monkeypatch.setattr(claims, "processes", lambda: 3)
    one = replace(job(("compile",), tmp_path), search=claims.LATER, device="cpu")
    assert row.first_call({}, lambda phase: None, one)["first_call_s"] == 4.5
