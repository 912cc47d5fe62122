import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from made_up import killed
from made_up import row as made_up_row

from sdopt import results
from sdopt.bench import claims, peers, process, searches, studies, walk
from sdopt.bench.judge import Judge
from sdopt.bench.ledger import NOT_TIMED, Ledger, alone
from sdopt.bench.row import Recipe
from sdopt.errors import UserError

CPU = process.context("cpu")
ROWS = [Recipe(i, i, (i,)) for i in ("baseline_fp32", "bf16", "sdpa")] + [Recipe("compile", "compile", ("compile",))]
ORDER = [row.id for row in ROWS]
SHARED = studies.settings("pocket", runs=2, height=64, width=64)
NUMBERS = ("latency_s", "first_call_s", "peak_memory_bytes", "stages_ms", "as_run")
DRAWN_WITH = {"steps": 30, "guidance_scale": 3.0, "scheduler": "euler"}


def noted(out, what):
    with open(out / "log.txt", "a") as log:
        log.write(what + "\n")


def first_call(state, tell, job):
    noted(job.cache.parent, f"cold {job.recipe.id}")
    state["id"] = job.recipe.id
    if job.artifacts:
        results.write_whole(job.artifacts, b"")
    return {"prepare_s": 1.0, "first_call_s": 90.0, "graphs": {"compiled": 2, "found": 0}}


def measure(state, tell, job):
    noted(job.cache.parent, f"measured {job.recipe.id}")
    made = made_up_row(job.recipe.id, 1.0)
    images = [np.full((1, 64, 64, 3), 10 * len(job.recipe.id), np.uint8)] * 2
    return {key: made[key] for key in NUMBERS} | {"first_call_s": 20.0, "drawn_with": dict(DRAWN_WITH)}, images


def settle(state, tell, job):
    made = made_up_row(job.recipe.id, 1.0)
    made["as_run"] |= {"attention": None, "attention_unknown": "not looked at"}
    return {key: made[key] for key in ("peak_memory_bytes", "stages_ms", "as_run")} | {"drawn_with": dict(DRAWN_WITH)}


def give_back(state, tell):
    assert state["id"], "only one that is ready is asked"


def draw_timed(state, tell, run):
    if state["id"] == "sdpa" and run == 3:
        raise MemoryError("CUDA out of memory")
    return 1.0 + run / 10 + len(state["id"]) / 100


def look(state, tell, job):
    if (job.cache.parent / "no look").exists():
        raise MemoryError("CUDA out of memory")
    return {"attention": ["flash"]}, {"unet_kernels": []}


def new_size(state, tell, job):
    raise MemoryError("CUDA out of memory")


def study(out, kind, runs=2, shared=SHARED):
    """A study over made-up measurements, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (walk, ("first_call", "measure")),
            (peers, ("first_call", "settle", "draw_timed", "give_back", "look", "new_size")),
        ):
            for name in names:
                patch.setattr(module, name, globals()[name])
        patch.setattr("sdopt.results._commit", lambda: None)
        if kind == "path":
            layout = lambda fresh, job, limit_s: {"status": "failed: not asked"}
            patch.setattr(walk, "_channels_last", layout)
            return walk.walk(shared, ROWS, "cpu", out, order=ORDER, resume=True)
        return peers.take_turns(shared | {"runs": runs}, ROWS, "cpu", out, order=ORDER)


def test_a_path_that_is_killed_goes_on_and_measures_no_finished_row_again(tmp_path):
    for writes in (1, 2, 2, 1, 2):
        killed(study, writes, tmp_path, "path")
    result = study(tmp_path, "path")
    assert [row["id"] for row in result["rows"]] == ORDER and {row["status"] for row in result["rows"]} == {"ok"}
    assert results.read(tmp_path / "pocket-path.json") == result
    log = (tmp_path / "log.txt").read_text().split("\n")
    # one write a row but compile's two; a kill before the write costs what that row had measured, and nothing else
    assert [log.count(f"measured {i}") for i in ORDER] == [2, 2, 3, 1]
    assert log.count("cold compile") == 2
    compiled = result["rows"][3]
    assert compiled["first_calls"] == {"cold_s": 90.0, "compiled": 2, "found": 0, "warm_s": 20.0}
    assert compiled["first_call_s"] == 90.0 and "first_calls" not in result["rows"][0]
    again = study(tmp_path, "path")
    assert again == result and (tmp_path / "log.txt").read_text().split("\n") == log, "nothing is left to do"


def test_a_path_that_went_on_still_compares_with_what_was_drawn_before(tmp_path):
    killed(study, 3, tmp_path, "path")
    quality = {row["id"]: row["quality"] for row in study(tmp_path, "path")["rows"]}
    assert quality["sdpa"]["against_baseline"]["max_abs"] == 10 * (len("baseline_fp32") - len("sdpa"))
    assert quality["sdpa"]["against_previous"]["exact"], "bf16's pictures were made the same"


def test_rows_measured_otherwise_are_not_mixed(tmp_path):
    killed(study, 2, tmp_path, "path")
    with pytest.raises(UserError, match="measured with another height: give another folder"):
        study(tmp_path, "path", shared=SHARED | {"height": 128})


def test_peers_that_have_been_timed_are_measured_whatever_becomes_of_the_last_look(tmp_path):
    """The writes: one of compile's first call, one a row that is ready, one a round, one a look."""
    killed(study, 8, tmp_path, "peers")
    rows = results.read(tmp_path / "pocket-peers.json")["rows"]
    assert {row["status"] for row in rows} == {"ok"} and {len(row["latency_s"]["runs"]) for row in rows} == {2}
    assert {row["as_run"]["attention_unknown"] for row in rows} == {"not looked at"}
    (tmp_path / "pocket-peers.json").unlink()
    (tmp_path / "no look").touch()
    for row in study(tmp_path, "peers")["rows"]:
        assert row["status"] == "ok" and row["latency_s"]["median"]
        assert row["as_run"]["attention_unknown"] == row["other_size_unknown"] == "MemoryError: CUDA out of memory"


def test_peers_that_are_killed_go_on_with_the_rounds_they_had(tmp_path):
    for writes in (3, 9, 7):
        killed(study, writes, tmp_path, "peers", 6)
    rows = {row["id"]: row for row in study(tmp_path, "peers", 6)["rows"]}
    assert rows["sdpa"]["status"] == "failed: MemoryError: CUDA out of memory"
    done = [rows[i] for i in ("baseline_fp32", "bf16", "compile")]
    assert {row["status"] for row in done} == {"ok"}
    assert all(row["as_run"]["attention"] == ["flash"] and "attention_unknown" not in row["as_run"] for row in done)
    for row in done:
        runs = row["latency_s"]["runs"]
        assert row["prepare_s"] == 1.0
        assert runs == pytest.approx([1.0 + run / 10 + len(row["id"]) / 100 for run in range(6)]), "each run once"
        assert row["latency_s"]["median"] == pytest.approx(np.median(runs))
        assert row["beside"] == ["baseline_fp32", "bf16", "compile"] or "sdpa" in row["beside"]
    assert rows["compile"]["first_calls"] == {"cold_s": 90.0, "compiled": 2, "found": 0, "warm_s": 90.0}


SEARCHING = [Recipe(i, i, (), compiled=True, searches=True) for i in ("one", "two")]


def compile_beside(state, tell, job):
    """A first call that ends when the other row's has begun, and fails or lasts where a file says so."""
    folder, others = job.cache.parent, {"one": "two", "two": "one"}
    state["id"] = job.recipe.id
    noted(folder, f"{job.search} {job.recipe.id}")
    if job.recipe.id not in others:
        return {"prepare_s": 1.0, "first_call_s": 5.0, "graphs": {"compiled": 0, "found": 0}}
    if (folder / f"{job.recipe.id} is refused").exists():
        raise UserError("bad weights")
    if job.search == claims.ALONE:
        results.write_whole(job.artifacts, b"")
        return {"prepare_s": 1.0, "first_call_s": 20.0, "graphs": {"compiled": 0, "found": 2}}
    while f"{job.search} {others[job.recipe.id]}" not in (folder / "log.txt").read_text() or (folder / "stuck").exists():
        time.sleep(0.02)
    if (folder / f"{job.recipe.id} fails").exists():
        raise MemoryError("CUDA out of memory")
    return {"first_call_s": 90.0, "graphs": {"compiled": 2, "found": 0}, "left": 0, "processes": 8}


def side_by_side(out):
    """What becomes of rows that search, or how it ended, and their ledger."""
    ledger = Ledger(out / "s.json", HEAD, [recipe.id for recipe in SEARCHING])
    jobs = [replace(walk.job_of(r, SHARED, Judge(SHARED), "cpu", out / "cache"), device="cuda") for r in SEARCHING]
    with pytest.MonkeyPatch.context() as patch, process.Fresh(CPU, ahead=False) as fresh:
        patch.setattr(walk, "first_call", compile_beside)
        try:
            return peers._compile_side_by_side(ledger, jobs, fresh, lambda done, text: None, 60), ledger
        except (KeyboardInterrupt, UserError) as end:
            return end, ledger


def test_rows_that_search_compile_side_by_side(tmp_path):
    compiled, ledger = side_by_side(tmp_path)
    assert compiled == {"one": True, "two": True}
    calls = {"cold_s": 90.0, "compiled": 2, "found": 0}
    assert ledger.row("one")["first_calls"] == calls | {"beside": ["two"]}
    assert ledger.row("two")["first_calls"] == calls | {"beside": ["one"]}


def test_a_row_that_cannot_compile_leaves_the_one_beside_it_alone(tmp_path):
    (tmp_path / "two fails").touch()
    compiled, ledger = side_by_side(tmp_path)
    assert compiled == {"one": True, "two": False}
    assert ledger.row("two")["status"] == "failed: MemoryError: CUDA out of memory"
    assert ledger.row("one")["first_calls"]["cold_s"] == 90.0


def peers_with_searches(out):
    """A peer study of a made-up GPU, on which two rows search and one does not."""
    rows = [Recipe("plain", "plain", ()), *SEARCHING]
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("first_call", compile_beside), ("settle", settle), ("draw_timed", draw_timed)):
            patch.setattr(peers, name, function)
        for name, function in (("give_back", give_back), ("look", look), ("new_size", new_size), ("head", lambda *_: HEAD)):
            patch.setattr(peers, name, function)
        patch.setattr(walk, "first_call", compile_beside)
        patch.setattr(process, "context", lambda device: CPU)
        patch.setattr(peers.sensors, "watch", lambda device, seen: nullcontext())
        return peers.take_turns(SHARED, rows, "cuda", out, study="s")


def test_peers_of_which_some_search_are_killed_and_go_on(tmp_path):
    for writes in (1, 3, 2):
        killed(peers_with_searches, writes, tmp_path)
    rows = peers_with_searches(tmp_path)["rows"]
    assert [row["id"] for row in rows] == ["plain", "one", "two"] and {row["status"] for row in rows} == {"ok"}
    assert [len(row["latency_s"]["runs"]) for row in rows] == [2, 2, 2]
    for row in rows[1:]:
        assert row["first_calls"]["cold_s"] == 90.0 and row["first_calls"]["warm_s"] == 20.0
    log = (tmp_path / "log.txt").read_text().split("\n")
    # until a call of its own has exported what was compiled, a row is compiled again: found on disk, and not counted again
    assert log.count("later one") == log.count("later two") == 4
    assert "later plain" not in log and log.index("alone one") > log.index("later two")


def test_what_is_refused_ends_the_other_row_at_once(tmp_path):
    (tmp_path / "stuck").touch()
    (tmp_path / "two is refused").touch()
    end, ledger = side_by_side(tmp_path)
    assert isinstance(end, UserError) and str(end) == "bad weights" and not ledger.result["rows"]


def test_finds_are_laid_out_for_two_rows_at_once(tmp_path):
    jobs = [walk.job_of(recipe, SHARED, Judge(SHARED), "cpu", tmp_path / "cache") for recipe in SEARCHING]
    for n in range(400):
        results.write_whole(jobs[0].inductor / "ab" / f"k{n}.best_config", b'{"found_by_coordesc": true}')
    searches.keep(jobs[0], 1.0)
    shutil.rmtree(jobs[0].inductor)
    with ThreadPoolExecutor(2) as pool:
        assert [known["spent_s"] for known in pool.map(searches.begin, jobs)] == [1.0, 0.0]
        list(pool.map(searches.go_on, jobs))
    assert [len(list((job.inductor / "ab").iterdir())) for job in jobs] == [400, 400]


def test_one_file_is_written_by_two_threads(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: results.write_whole(tmp_path / "file", b"x" * 9), range(400)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupted_rows_stop_at_once_and_have_not_failed(tmp_path):
    (tmp_path / "stuck").touch()
    began = lambda: (tmp_path / "log.txt").exists() and (tmp_path / "log.txt").read_text().count(claims.LATER) == 2

    def interrupt():
        deadline = time.monotonic() + 60
        while not began() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        end, ledger = side_by_side(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(end, KeyboardInterrupt)
    assert not any(ledger.row(i).get("status", NOT_TIMED) != NOT_TIMED for i in ("one", "two"))


HEAD = {"schema": 1, "study": "s", "environment": dict.fromkeys(results.ENVIRONMENT), "settings": SHARED}


def test_a_run_that_begins_anew_keeps_what_it_does_not_measure_if_that_was_measured_alike(tmp_path):
    rows = [{"id": i, "status": "failed: too large", "settings": {}} for i in "abc"]
    Ledger(tmp_path / "s.json", HEAD, "abc").put(*rows)
    assert Ledger(tmp_path / "s.json", HEAD, "abc", again=["b"]).result["rows"] == [rows[0], rows[2]]
    otherwise = HEAD | {"settings": SHARED | {"steps": 1}}
    assert Ledger(tmp_path / "s.json", otherwise, "abc", again=["b"]).result["rows"] == []
    walk._clear_pictures(tmp_path, [])
    for name in ("1-baseline_fp32.png", "2-bf16.png", "3-mine.png"):
        (tmp_path / name).touch()
    walk._clear_pictures(tmp_path, ["bf16"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"2-bf16.png", "3-mine.png"}


def test_a_row_that_was_begun_is_not_done(tmp_path):
    head = HEAD
    ledger = Ledger(tmp_path / "s.json", head, ["a", "b", "c"])
    ledger.put({"id": "c", "status": "failed: too large", "settings": {}})
    ledger.put({"id": "a", "status": NOT_TIMED, "settings": {}})
    assert [row["id"] for row in results.read(tmp_path / "s.json")["rows"]] == ["a", "c"], "in the study's order"
    assert [ledger.is_done(i) for i in "abc"] == [False, False, True]
    assert Ledger(tmp_path / "s.json", head, ["a", "b", "c"], resume=True).is_done("c")
    assert not Ledger(tmp_path / "s.json", head, ["a", "b", "c"], resume=True, retry=True).is_done("c")
    assert not Ledger(tmp_path / "s.json", head, ["a", "b", "c"]).is_done("c"), "without resume it begins anew"


def test_a_row_that_failed_keeps_what_its_cold_call_cost(tmp_path):
    ledger = Ledger(tmp_path / "s.json", HEAD, ["compile"], retry=True)
    calls = {"cold_s": 1800.0, "compiled": 2, "found": 0}
    ledger.put({"id": "compile", "status": "failed: out of memory", "settings": {}, "first_calls": calls})
    begun = ledger.begun(ROWS[3])
    assert begun["first_calls"] == calls and begun["status"] == NOT_TIMED and not ledger.is_done("compile")


def test_without_its_cache_a_row_is_compiled_again_and_keeps_what_its_first_call_took(tmp_path):
    ledger = Ledger(tmp_path / "s.json", HEAD, ORDER, resume=True)
    ledger.put({"id": "compile", "status": NOT_TIMED, "settings": {}, "first_calls": {"cold_s": 1800.0}})
    job = walk.job_of(ROWS[3], SHARED, Judge(SHARED), "cpu", tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch, process.Fresh(CPU, ahead=False) as fresh:
        patch.setattr(walk, "first_call", first_call)
        for _ in range(2):
            row = ledger.begun(ROWS[3])
            walk.compile_first(ledger, row, fresh, job, lambda phase: None, 60)
            assert row["first_calls"] == {"cold_s": 1800.0}
    assert (tmp_path / "log.txt").read_text() == "cold compile\n", "then its export is at hand"


def test_one_file_is_measured_into_by_one_process_of_one_command(tmp_path):
    target = tmp_path / "out" / "s.json"
    with alone(target.parent), pytest.raises(UserError, match="another process measures into"), alone(target.parent):
        pass
    with alone(target.parent):
        Ledger(target, HEAD | {"measured_by": "bench"}, ["a"]).put({"id": "a", "status": "failed: x", "settings": {}})
    for resume in (False, True):
        with pytest.raises(UserError, match="rows of another command"):
            Ledger(target, HEAD | {"measured_by": "run"}, ["a"], resume)
    with pytest.raises(UserError, match="has a row a, which is none of this study"):
        Ledger(target, HEAD | {"measured_by": "bench"}, ["b"], resume=True)


def test_rows_of_two_commits_name_both(tmp_path):
    commit = lambda name: HEAD | {"environment": HEAD["environment"] | {"commit": name}}
    row = {"id": "a", "status": "failed: x", "settings": {}}
    Ledger(tmp_path / "s.json", commit("old"), ["a", "b"]).put(row)
    ledger = Ledger(tmp_path / "s.json", commit("new"), ["a", "b"], resume=True)
    assert ledger.result["environment"]["commit"] == "old, then new"


def test_pictures_of_other_settings_are_not_compared_with(tmp_path):
    images = [np.zeros((1, 64, 64, 3), np.uint8)] * 2
    Judge(SHARED, tmp_path).judge("baseline_fp32", images)
    assert Judge(SHARED, tmp_path).judge("bf16", images)["against_baseline"]["exact"]
    assert Judge(SHARED | {"steps": 7}, tmp_path).judge("bf16", images)["against_baseline"] is None


def test_another_machine_starts_warm_from_what_was_exported(tmp_path):
    """A real compilation, of one call of one step: found again without Inductor's own folder, from the exported file."""
    shared, told = studies.settings("pocket", height=64, width=64, steps=1, runs=1), []
    recipe = Recipe("compile", "compile", ("bf16", "sdpa", "compile"))
    one, two = (walk.job_of(recipe, shared, Judge(shared), "cpu", tmp_path / name) for name in ("one", "two"))
    with process.Fresh(CPU, ahead=False) as fresh:
        there = walk.cold(fresh, one, told.append, 300)
        assert there["compiled"] > 0 and there["cold_s"] > 0 and process.KEEPING in told
        two.artifacts.parent.mkdir()
        shutil.copy(one.artifacts, two.artifacts)
        here = walk.cold(fresh, two, told.append, 300)
    assert here == {"cold_s": None, "compiled": 0, "found": there["compiled"]}
