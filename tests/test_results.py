import errno
import json
import os

import pytest
from made_up import result, row

from sdopt import results
from sdopt.errors import UserError


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "pocket-path.json"
    results.write(path, result())
    assert results.read(path) == result()
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"


def test_environment_has_every_key_of_the_schema_and_names_the_machine():
    environment = results.environment("cpu")
    assert set(environment) == set(results.ENVIRONMENT)
    assert environment["gpu"] is None
    assert results.machine_name(environment) == f"cpu-{len(os.sched_getaffinity(0))}-cores"
    assert results.machine_name({"gpu": "NVIDIA H200", "cpu": "any, 16 cores"}) == "nvidia-h200"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r.update(schema=2), "schema is 2"),
        (lambda r: r["environment"].pop("cudnn"), "environment lacks cudnn"),
        (lambda r: r["settings"].pop("prompt"), "settings lacks prompt"),
        (lambda r: r["rows"][1].update(id="baseline_fp32"), "two rows have one id"),
        (lambda r: r["rows"][1].update(status="fine"), "row bf16: status is 'fine'"),
        (lambda r: r["rows"][1]["latency_s"].update(median=float("nan")), "row bf16: latency_s"),
        (lambda r: r["rows"][1]["latency_s"].update(runs=[]), "row bf16: latency_s lacks its runs"),
        (lambda r: r["rows"][1].update(first_call_s=-1), "row bf16: first_call_s is -1"),
        (lambda r: r["rows"][1]["stages_ms"].pop("vae"), "row bf16: stages_ms"),
        (lambda r: r["rows"][1].pop("quality"), "row bf16: quality"),
        (lambda r: r.update(rows=[3]), "row 3: no id"),
    ],
)
def test_a_fault_is_told_in_one_line_and_nothing_is_written(tmp_path, spoil, said):
    spoiled = result()
    spoil(spoiled)
    with pytest.raises(UserError) as told:
        results.write(tmp_path / "x.json", spoiled)
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_row_needs_no_numbers():
    failed = result()
    failed["rows"][3] = {"id": "compile", "label": "compile", "settings": {}, "status": "failed: out of memory"}
    results.validate(failed)


@pytest.mark.parametrize("content", ["", '{"schema": 1, "rows": [', "\x00\xff"])
def test_a_file_that_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="is not JSON .* measure it again"):
        results.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*No such file"):
        results.read(tmp_path / "none.json")


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "pocket-path.json"
    results.write(path, result())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        results.write(path, result(steps=4))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_writing_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        results.write(tmp_path / "file" / "x.json", result())


def test_merge_replaces_rows_by_id_and_keeps_the_others():
    new = result() | {"rows": [row("bf16", 1.0), row("extra", 3.0)]}
    merged = results.merge(result(), new)
    assert [r["id"] for r in merged["rows"]] == [r["id"] for r in result()["rows"]] + ["extra"]
    assert merged["rows"][1]["latency_s"]["median"] == 1.0
    results.validate(merged)


def test_merge_refuses_rows_measured_otherwise():
    with pytest.raises(UserError, match="another steps"):
        results.merge(result(), result(steps=4))
    other = json.loads(json.dumps(result()))
    other["environment"]["torch"] = "2.14.0"
    with pytest.raises(UserError, match="another torch"):
        results.merge(result(), other)


def test_compare_tells_the_ratio_and_whether_it_is_clear():
    fast, slow, alike = row("a", 1.0), row("b", 2.0), row("c", 1.04)
    assert results.compare(fast, slow) == {"speedup": 2.0, "clear": True}
    assert results.compare(slow, fast) == {"speedup": 0.5, "clear": True}
    assert not results.compare(fast, alike)["clear"]


def test_a_row_without_times_is_not_compared():
    failed = {"id": "b", "settings": {}, "status": "failed: out of memory"}
    with pytest.raises(UserError, match=r"row b has no times \(failed: out of memory\)"):
        results.compare(failed, failed)


def test_rows_of_different_settings_are_compared_only_when_that_is_the_subject():
    a, b = row("a", 1.0, settings={"steps": 20}), row("b", 2.0)
    with pytest.raises(UserError, match="differ in steps"):
        results.compare(a, b)
    assert results.compare(a, b, about=("steps",))["speedup"] == 2.0
