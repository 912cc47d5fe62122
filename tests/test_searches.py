import fcntl
import json
import lzma
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import peers_result, result

from sdopt import report, results, tables
from sdopt.bench import claims, process, searches, walk
from sdopt.bench.row import Job, Recipe
from sdopt.errors import UserError

SEARCHING = Recipe("compile_max_autotune", "search", (), compiled=True, searches=True)
PLAIN = Recipe("compile_reduce_overhead", "no search", (), compiled=True)
TUNED = {"XBLOCK": 4, "num_warps": 16, "found_by_coordesc": True}


OTHER = Recipe("tutorial_recipe", "search", (), compiled=True, searches=True)


def job(folder, recipe=SEARCHING, device="cpu"):
    shared = {key: None for key in ("weights", "height", "width", "steps", "guidance_scale", "scheduler")}
    return Job(recipe, model="sd15", device=device, prompts=(), seeds=(), cache=folder / "cache", **shared)


def inductor_with(folder, **files):
    for name, content in files.items():
        path = job(folder).inductor / name.replace("__", "/").replace("_config", ".best_config")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_finds_go_from_one_cache_to_another_and_nothing_else_does(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    inductor_with(
        here, ab__kernel_config=TUNED, ab__chosen_config={"XBLOCK": 8}, ab__half_config='{"XBL', cache__9f={"mm": {}}
    )
    inductor_with(here, ab__kernel={"cubin": 1}, triton__kernel={"name": "k"})
    searches.keep(job(here), 100.0)
    (there / "cache").mkdir(parents=True)
    name = f"sd15{results.SEARCHES}"
    (there / "cache" / name).write_bytes((here / "cache" / name).read_bytes())
    assert searches.begin(job(there)) == {"spent_s": 100.0, "finished": False}
    inductor = job(there).inductor
    there_now = lambda: {path.relative_to(inductor).as_posix(): json.loads(path.read_text()) for path in inductor.glob("*/*")}
    assert there_now() == {"cache/9f": {"mm": {}}}, "the graph is compiled as if no tile had been found"
    searches.go_on(job(there))
    assert there_now() == {"cache/9f": {"mm": {}}, "ab/kernel.best_config": TUNED}
    assert searches.begin(job(there, PLAIN)) == searches.NOTHING


def test_a_cache_keeps_what_it_has_found_itself(tmp_path):
    inductor_with(tmp_path, ab__kernel_config=TUNED)
    searches.keep(job(tmp_path), 1.0)
    inductor_with(tmp_path, ab__kernel_config=TUNED | {"XBLOCK": 32})
    searches.go_on(job(tmp_path))
    own = job(tmp_path).inductor / "ab" / "kernel.best_config"
    assert json.loads(own.read_text())["XBLOCK"] == 32
    searches.keep(job(tmp_path), 2.0, finished=True)
    assert searches.begin(job(tmp_path)) == {"spent_s": 2.0, "finished": True}
    for instead in (None, TUNED | {"found_by_coordesc": False}):  # the best of the few that are always tried
        own.write_text(json.dumps(instead)) if instead else own.unlink()
        searches.go_on(job(tmp_path))
        assert json.loads(own.read_text())["XBLOCK"] == 32, "the newer find has replaced the older"


def test_what_two_rows_found_out_about_products_stands_in_one_find(tmp_path):
    """Inductor has one file of them for a machine, in each row's folder."""
    one, two = job(tmp_path), job(tmp_path, OTHER)
    for row, times in ((one, {"mm": {"a": {"fast": 1}, "b": {"fast": 2}}}), (two, {"mm": {"a": {"slow": 3}}, "conv": {}})):
        results.write_whole(row.inductor / "cache" / "9f", json.dumps(times).encode())
        searches.keep(row, 1.0)
    both = {"mm": {"a": {"fast": 1, "slow": 3}, "b": {"fast": 2}}, "conv": {}}
    third = job(tmp_path / "there")
    name = f"sd15{results.SEARCHES}"
    results.write_whole(third.cache / name, (one.cache / name).read_bytes())
    searches.begin(third)
    assert json.loads((third.inductor / "cache" / "9f").read_text()) == both


def test_a_row_without_a_search_leaves_no_seconds_behind(tmp_path):
    searches.keep(job(tmp_path, PLAIN), 20.0)
    assert searches.begin(job(tmp_path, PLAIN))["spent_s"] == 20.0
    searches.keep(job(tmp_path, PLAIN), 75.0, finished=True)
    assert searches.begin(job(tmp_path, PLAIN)) == searches.NOTHING


def test_a_file_writes_nowhere_but_into_the_cache(tmp_path):
    (tmp_path / "cache").mkdir()
    names = ("../../evil.best_config", "/tmp/evil.best_config", "ab/kernel.py", "ab/c/kernel.best_config", "cache/../x")
    kept = {"rows": {}, "finds": dict.fromkeys(names, TUNED)}
    file = tmp_path / "cache" / f"sd15{results.SEARCHES}"
    file.write_bytes(lzma.compress(json.dumps(kept).encode()))
    searches.begin(job(tmp_path))
    searches.go_on(job(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("content", [b"no archive", lzma.compress(b"{"), lzma.compress(b"{}" * 999)[:40]])
def test_a_damaged_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"sd15{results.SEARCHES}").write_bytes(content)
    with pytest.raises(UserError, match="is damaged: delete it") as refusal:
        searches.begin(job(tmp_path))
    assert "\n" not in str(refusal.value)


def find_all(state, tell, job):
    """A first call that finds every graph, but takes its time."""
    tell("first call, which compiles")
    time.sleep(1.0)
    return {"first_call_s": 90.0, "graphs": {"compiled": 0, "found": 2}, "left": [], "processes": 2}


def test_a_search_that_is_finished_stays_so_while_its_row_is_called_again(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", find_all)
    monkeypatch.setattr(process, "LOOK_S", 0.05)
    searches.keep(job(tmp_path), 300.0, finished=True)
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        first = walk.cold(fresh, job(tmp_path, device="cuda"), lambda phase: None, 60.0)
    assert first["cold_s"] == 300.0 and searches.begin(job(tmp_path)) == {"spent_s": 300.0, "finished": True}


def compile_for_long(state, tell, job):
    tell("preparing")
    time.sleep(0.3)
    tell("first call, which compiles")
    while (job.cache / "stuck").exists():
        time.sleep(0.1)
    return {"first_call_s": 90.0, "graphs": {"compiled": 2, "found": 0}}


def test_a_compilation_that_was_stopped_goes_on_with_its_seconds_counted_in(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", compile_for_long)
    monkeypatch.setattr(process, "LOOK_S", 0.05)
    cold = lambda limit_s: walk.cold(fresh, job(tmp_path), lambda phase: None, limit_s)
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        fresh.take().close()  # the server's imports are not what the limit is about
        results.write_whole(tmp_path / "cache" / "stuck", b"")
        with pytest.raises(process.RowFailed, match="stopped after"):
            cold(4.0)
        spent = searches.begin(job(tmp_path))["spent_s"]
        assert 0 < spent < 3.8, "the seconds before the call are none of its"
        (tmp_path / "cache" / "stuck").unlink()
        first = cold(60.0)
        assert first == {"cold_s": spent + 90, "compiled": 2, "found": 0, "before_s": spent}
        again = cold(60.0)  # where the compiled graphs are gone, and the search's finds are not
        assert again["cold_s"] == again["before_s"] == spent + 90


def test_without_an_earlier_attempt_a_first_call_is_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", compile_for_long)
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        first = walk.cold(fresh, job(tmp_path, PLAIN), lambda phase: None, 60.0)
    assert first == {"cold_s": 90.0, "compiled": 2, "found": 0}


AS_IT_WAS = SimpleNamespace(config=SimpleNamespace(kwargs={"XBLOCK": 8}, num_warps=4, num_stages=1))


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Inductor's tuners of six kernels: a search times three candidates, for 50 ms each, and says which kernel it was."""
    from torch._inductor.runtime.autotune_cache import AutotuneCache
    from torch._inductor.runtime.benchmarking import benchmarker
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def search(tuner, launcher):
        for candidate in "abc":
            benchmarker.benchmark_gpu(candidate)
        return f"{launcher}, searched"

    monkeypatch.setattr(CachingAutotuner, "_coordinate_descent_tuning", search)
    monkeypatch.setattr(type(benchmarker), "benchmark_gpu", lambda benchmarker, candidate: time.sleep(0.05))
    tuners = [CachingAutotuner.__new__(CachingAutotuner) for _ in range(6)]
    for n, tuner in enumerate(tuners):
        tuner.filename, tuner.autotune_time_taken_ns = str(tmp_path / "inductor" / f"c{n}.py"), 0
        tuner.save_cache_hook = AutotuneCache.create({}, tuner.filename, "few").save
    claims.begin(tmp_path / "claims" / "row")
    return tuners


def find_of(tuner):
    return Path(tuner.save_cache_hook.__self__.local_cache[1])


def note_find(tuner, **find):
    results.write_whole(find_of(tuner), json.dumps(TUNED | {"configs_hash": "few", "num_stages": 1} | find).encode())


def test_a_search_left_for_later_leaves_kernels_as_they_are_and_counts_them(kernels, tmp_path):
    with claims.applied(claims.LATER, tmp_path / "claims" / "row") as search:
        assert [k._coordinate_descent_tuning(AS_IT_WAS) for k in (*kernels, *kernels)] == [AS_IT_WAS] * 12
    assert search.left == {str(find_of(kernel)) for kernel in kernels} and not search.waited
    noted = json.loads(find_of(kernels[0]).read_text())
    assert noted["XBLOCK"] == 8 and not noted["found_by_coordesc"], "no search has found it"
    assert kernels[0]._coordinate_descent_tuning("it") == "it, searched", "afterwards all is as before"


@pytest.mark.parametrize("how", [claims.LATER, claims.SHARED])
def test_what_was_found_before_is_neither_left_nor_claimed_nor_written_over(kernels, tmp_path, how):
    """Triton forgets the mark of a config that went through a pickle, so that Inductor asks for a search once more."""
    note_find(kernels[0])
    note_find(kernels[1], configs_hash="others")  # of a kernel that was tried with others: Inductor does not take it
    note_find(kernels[2])
    kernels[2].autotune_time_taken_ns = 5  # PyTorch 2.13 has just noted the best of the few that it always tries
    folder = tmp_path / "claims" / "row"
    with claims.applied(how, folder) as search:
        for kernel in kernels[:3]:
            kernel._coordinate_descent_tuning(AS_IT_WAS)
    assert json.loads(find_of(kernels[0]).read_text())["XBLOCK"] == TUNED["XBLOCK"]
    if how == claims.LATER:
        assert search.left == {str(find_of(kernel)) for kernel in kernels[1:3]}
    else:
        assert sorted(mark.name for mark in folder.glob(f"*{claims.SECONDS}")) == ["c1.seconds", "c2.seconds"]


def test_where_inductor_keeps_nothing_nothing_is_left_for_later(kernels, tmp_path):
    kernels[0].save_cache_hook = None
    with claims.applied(claims.LATER, tmp_path / "claims" / "row") as search:
        assert kernels[0]._coordinate_descent_tuning(AS_IT_WAS) == AS_IT_WAS
    assert not search.left


@contextmanager
def somebody_times(folder):
    with open(folder / "claims" / "gpu.lock", "a") as gpu:
        fcntl.flock(gpu, fcntl.LOCK_EX)
        yield


def test_a_shared_search_takes_every_kernel_once_and_waits_for_the_gpu(kernels, tmp_path):
    folder = tmp_path / "claims" / "row"
    with claims.applied(claims.SHARED, folder) as seen:
        assert kernels[0]._coordinate_descent_tuning("it") == "it, searched"
        assert kernels[0]._coordinate_descent_tuning("it") == "it", "another has it"
        with ThreadPoolExecutor(1) as pool:
            with somebody_times(tmp_path):
                waiting = pool.submit(kernels[1]._coordinate_descent_tuning, "it")
                time.sleep(0.5)
                assert not waiting.done(), "of whichever row it is"
            assert waiting.result() == "it, searched"
    assert len(claims.seconds(folder)) == 2 and sum(seen.waited) > 0.4
    assert all(0.15 <= seconds < 0.45 for seconds in claims.seconds(folder)), "without the waiting"


def test_what_a_compilation_waits_for_others_is_known(kernels, tmp_path):
    from torch._inductor.runtime.benchmarking import benchmarker

    with claims.applied(claims.LATER, tmp_path / "claims" / "row") as seen, ThreadPoolExecutor(1) as pool:
        with somebody_times(tmp_path):
            waiting = pool.submit(benchmarker.benchmark_gpu, "candidate of a product")
            time.sleep(0.5)
            assert not waiting.done()
        waiting.result()
    assert 0.4 < sum(seen.waited) < 5


def search_for_long(state, tell, job):
    """A first call of which four kernels are to be searched, 0.2 s each."""
    tell("first call, which compiles")
    if job.search == claims.LATER:
        left = [str(job.inductor / "ab" / f"c{kernel}.best_config") for kernel in range(4)]
        return {"first_call_s": 90.0, "graphs": {"compiled": 2, "found": 0}, "left": left, "processes": 2}
    assert job.search == claims.SHARED
    results.write_whole(job.cache / f"{os.getpid()}.searched", b"")
    for kernel in range(4):
        mark = job.claims / f"c{kernel}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            continue
        time.sleep(0.2)
        results.write_whole(mark.with_suffix(claims.SECONDS), b"100.0")
    return {}


def test_a_search_on_a_gpu_is_shared_and_its_seconds_are_added_up(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", search_for_long)
    monkeypatch.setattr(process, "LOOK_S", 0.5)
    told = []
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        first = walk.cold(fresh, job(tmp_path, device="cuda"), told.append, 60.0)
        assert first == {"cold_s": 490.0, "compiled": 2, "found": 0, "shared_s": 400.0}
        again = walk.cold(fresh, job(tmp_path, device="cuda"), told.append, 60.0)
    assert again["cold_s"] == again["before_s"] == 490.0
    assert any("2 processes search" in phase and "of 4 kernels done" in phase for phase in told)


def test_only_what_no_search_has_found_is_searched_for(tmp_path, monkeypatch):
    """What was found on another machine is put where Inductor looks for it between the two passes."""
    monkeypatch.setattr(walk, "first_call", search_for_long)
    monkeypatch.setattr(process, "LOOK_S", 0.5)
    there, told = tmp_path / "there", []
    for known, finds in ((["c1"], 3), ([f"c{kernel}" for kernel in range(4)], 0)):
        inductor_with(tmp_path, **{f"ab__{kernel}_config": TUNED for kernel in known})
        searches.keep(job(tmp_path), 1.0, finished=finds == 0)
        name = f"sd15{results.SEARCHES}"
        results.write_whole(there / "cache" / name, (tmp_path / "cache" / name).read_bytes())
        with process.Fresh(process.context("cpu"), ahead=False) as fresh:
            walk.cold(fresh, job(there, device="cuda"), told.append, 60.0)
        assert any((f"of {finds} kernels done" if finds else "compiling what was found") in phase for phase in told)
        assert all(searches.is_found(job(there).inductor / "ab" / f"{kernel}.best_config") for kernel in known)
        searched = list((there / "cache").glob("*.searched"))
        assert len(searched) == (2 if finds else 1), "what was found one process compiles"
        for mark in searched:
            mark.unlink()
        told.clear()


def test_a_shared_search_that_was_stopped_has_its_seconds_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", search_for_long)
    monkeypatch.setattr(process, "LOOK_S", 0.5)

    def stop(phase):
        if " 2 of 4" in phase or " 3 of 4" in phase:
            raise KeyboardInterrupt

    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        with pytest.raises(KeyboardInterrupt):
            walk.cold(fresh, job(tmp_path, device="cuda"), stop, 60.0)
    kept = searches.begin(job(tmp_path))
    assert not kept["finished"] and kept["spent_s"] >= 90 + 100


def all_die(state, tell, job):
    if job.search == claims.SHARED:
        os._exit(9)
    return search_for_long(state, tell, job)


def test_a_search_of_which_no_process_is_left_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", all_die)
    with process.Fresh(process.context("cpu"), ahead=False) as fresh, pytest.raises(process.RowFailed, match="exit code 9"):
        walk.cold(fresh, job(tmp_path, device="cuda"), lambda phase: None, 60.0)
    assert not searches.begin(job(tmp_path))["finished"]


def one_is_stuck(state, tell, job):
    """The first of two processes that search is done, the other never is."""
    if job.search != claims.SHARED:
        return search_for_long(state, tell, job)
    try:
        (job.claims / "c0").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(60)
    results.write_whole((job.claims / "c0").with_suffix(claims.SECONDS), b"100.0")
    return {}


def test_a_search_that_is_ended_from_elsewhere_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", one_is_stuck)
    monkeypatch.setattr(process, "LOOK_S", 0.5)
    with process.Fresh(process.context("cpu"), ahead=False) as fresh, ThreadPoolExecutor(1) as pool:
        tell = lambda phase: told.append(phase)
        told, call = [], pool.submit(lambda: walk.cold(fresh, job(tmp_path, device="cuda"), tell, 60.0))
        while not any("1 of 4" in phase for phase in told):
            time.sleep(0.05)
        fresh.stop()
        with pytest.raises(process.RowFailed):
            call.result()
        with pytest.raises(process.RowFailed, match="stopped"):
            fresh.take()
    kept = searches.begin(job(tmp_path))
    assert not kept["finished"] and kept["spent_s"] == 190


def test_rows_that_compile_side_by_side_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "first_call", search_for_long)
    monkeypatch.setattr(process, "LOOK_S", 0.5)
    told = []
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        first = walk.cold(fresh, job(tmp_path, device="cuda"), told.append, 60.0, beside=[job(tmp_path, OTHER)])
    assert first["shared_s"] == 400.0 and any(phase.startswith("1 processes search") for phase in told)


def test_a_table_says_which_seconds_are_of_an_earlier_process():
    made = peers_result()
    row = next(row for row in made["rows"] if row["id"] == "tutorial_recipe")
    row["first_calls"] = {"cold_s": 1240.0, "warm_s": 50.0, "compiled": 2, "found": 0, "before_s": 1035.0}
    assert any("counted in: tutorial_recipe 1035 s of 1240 s" in said.replace(",", "") for said in tables.remarks(made))
    row["first_calls"]["shared_s"] = row["first_calls"].pop("before_s")
    assert any("counted in: tutorial_recipe 1035 s of 1240 s" in said.replace(",", "") for said in tables.remarks(made))
    assert not any("compiled beside" in said for said in tables.remarks(made))
    row["first_calls"]["beside"] = ["compile_max_autotune"]
    assert "first call, compiled beside another row's: tutorial_recipe" in tables.remarks(made)
    del row["first_calls"]["shared_s"]
    assert not any("counted in" in said for said in tables.remarks(made))


def test_a_study_takes_its_searches_along(tmp_path):
    out, root = tmp_path / "out", tmp_path / "root"
    made = result()
    results.write(out / "pocket-path.json", made)
    results.write_whole(out / "cache" / f"pocket{results.SEARCHES}", b"finds")
    results.write_whole(out / "cache" / f"sdxl{results.SEARCHES}", b"others")
    report.add(out, root)
    folder = root / "figures" / "data" / results.machine_name(made["environment"])
    assert sorted(path.name for path in folder.iterdir()) == ["pocket-path.json", f"pocket{results.SEARCHES}"]


SEARCH = """
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from sdopt import compilation
from sdopt.bench import claims

AsyncCompile.wait_pool_ready()  # kernels come from its processes, as those of a large model do
model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.SiLU(), torch.nn.LayerNorm(512)).cuda().bfloat16()
options = compilation.mode_options("max-autotune") | compilation.SEARCH
with torch.no_grad(), claims.applied(sys.argv[1], Path(sys.argv[2])) as search:
    torch.compile(model, options=options)(torch.randn(4096, 512, device="cuda").bfloat16())
print(sys.argv[1], len(search.waited), len(search.left), counters["inductor"]["coordesc_tuning_bench"])
"""


def searching(folder, how):
    """A process that compiles a small model for the GPU, to be asked for (kernels left out, candidates timed)."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(job(folder).inductor)}
    command = [sys.executable, "-c", SEARCH, how, str(job(folder).claims)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def counted(searcher):
    said, _ = searcher.communicate(timeout=300)
    assert searcher.returncode == 0
    how, waited, left, timed = said.split()[-4:]
    assert how == claims.ALONE or int(waited) >= int(timed), "whatever is timed has the lock"
    return int(left), int(timed)


@pytest.mark.gpu
def test_gpu_what_was_found_is_not_searched_for_again(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert counted(searching(here, claims.ALONE))[1] > 0
    searches.keep(job(here), 1.0, finished=True)
    (there / "cache").mkdir(parents=True)
    name = f"sd15{results.SEARCHES}"
    (there / "cache" / name).write_bytes((here / "cache" / name).read_bytes())
    searches.begin(job(there))
    left, timed = counted(searching(there, claims.LATER))
    assert left > 0 and timed == 0
    searches.go_on(job(there))
    claims.begin(job(there).claims)
    assert counted(searching(there, claims.SHARED)) == (0, 0)
    assert counted(searching(there, claims.LATER)) == (0, 0)


@pytest.mark.gpu
def test_gpu_a_search_is_shared_and_then_done(tmp_path):
    left, timed = counted(searching(tmp_path, claims.LATER))
    assert left > 0 and timed == 0
    claims.begin(job(tmp_path).claims)
    two = [searching(tmp_path, claims.SHARED) for _ in range(2)]
    assert sum(counted(one)[1] for one in two) > 0
    assert len(claims.seconds(job(tmp_path).claims)) == left
    assert counted(searching(tmp_path, claims.LATER)) == (0, 0)
