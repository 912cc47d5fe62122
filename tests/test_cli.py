import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import run_folder
from PIL import Image

from sdopt import report, results
from sdopt.cli import main
from sdopt.pocket import PIPELINE

ROOT = Path(__file__).parents[1]


def refused(capsys, *argv):
    """What the command says to bad input: one line on stderr, nothing else, and exit code 2."""
    assert main([str(part) for part in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdopt: ")
    assert err.count("\n") == 1
    return err


def sdopt(*argv, **environment):
    """The command in a process of its own, without a network."""
    return subprocess.run(
        [sys.executable, "-m", "sdopt", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "sd3"], "unknown model 'sd3': choose one of pocket, sd15, sdxl"),
        (["--only", "bf16,int4"], "unknown row 'int4': choose from baseline_fp32, bf16"),
        (["--steps", 0], "--steps 0 is too few: use 1 or more"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--batch", 0], "--batch 0 is too few: use 1 or more"),
        (["--runs", 0], "--runs 0 is too few: use 1 or more"),
        (["--cutoff", 1.5], "--cutoff 1.5 is outside [0, 1]"),
        (["--cutoff", -0.1], "--cutoff -0.1 is outside [0, 1]"),
        (["--cutoff", "nan"], "--cutoff nan is outside [0, 1]"),
        (["--height", 250], "height 250 is not a positive multiple of 8: use 248"),
        (["--width", 0], "width 0 is not a positive multiple of 8: use 8"),
        (["--device", "tpu"], "unknown device 'tpu': use cpu or cuda"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate: see `sdopt run --help`"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(capsys, tmp_path, options, said):
    assert said in refused(capsys, "run", "--model", "pocket", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_no_command_or_an_unknown_one_is_refused(capsys):
    assert "COMMAND" in refused(capsys)
    assert "invalid choice: 'race'" in refused(capsys, "race")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none(capsys, tmp_path):
    assert "use --device cpu" in refused(capsys, "run", "--device", "cuda", "--out", tmp_path / "out")


def test_an_out_that_cannot_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file is no folder: give another" in refused(capsys, "run", "--model", "pocket", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_space_to_write_is_found_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
    assert "only 1 MiB are free" in refused(capsys, "run", "--model", "pocket", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    options = ("--model", "pocket", "--weights", tmp_path / "empty", "--out", tmp_path / "out")
    assert main([str(part) for part in ("run", *options)]) == 2
    assert "is no diffusers pipeline" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_truncated_weights_file(tmp_path):
    folder = shutil.copytree(PIPELINE, tmp_path / "pocket")
    file = sorted((folder / "vae").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-64])
    done = sdopt("run", "--model", "pocket", "--weights", folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"sdopt: cannot load {folder}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_unreachable_hub(tmp_path):
    done = sdopt("run", "--model", "sdxl", "--out", tmp_path / "out", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 2
    assert "run `sdopt run --model pocket`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", [("env",), ("bench", "sdxl-path", "--dry-run")])
def test_nobody_who_reads_on_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "sdopt", *command], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_result_file_that_is_not_json(capsys, tmp_path):
    (tmp_path / "pocket-path.json").write_text('{"schema": 1, ')
    assert "is not JSON" in refused(capsys, "report", "--add", tmp_path)


def test_a_walk_leaves_a_table_a_result_a_figure_and_a_picture_a_row(tmp_path):
    options = ("--steps", 2, "--runs", 2, "--height", 64, "--width", 64, "--only", "baseline_fp32,bf16,sdpa")
    done = sdopt("run", "--model", "pocket", "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"pocket-path.json", "pocket-path.png", "pocket-path"}
    pictures = {path.name for path in (tmp_path / "pocket-path").iterdir()}
    assert pictures == {"1-baseline_fp32.png", "2-bf16.png", "3-sdpa.png"}
    result = results.read(tmp_path / "pocket-path.json")
    assert [(row["id"], row["status"]) for row in result["rows"]] == [
        *(("baseline_fp32", "ok"), ("bf16", "ok"), ("sdpa", "ok"))
    ]
    dtypes = [row["as_run"]["unet_dtype"] for row in result["rows"]]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]
    assert result["rows"][0]["stages_ms"]["unet_calls"] == 2
    assert len(result["rows"][0]["latency_s"]["runs"]) == 2
    assert result["rows"][2]["quality"]["against_previous"]["psnr_db"] is None or (
        result["rows"][2]["quality"]["against_previous"]["psnr_db"] > 25
    )
    for row in result["rows"]:
        assert f"\n{row['id']} " in done.stdout
    with Image.open(tmp_path / "pocket-path" / "1-baseline_fp32.png") as image:
        assert image.size == (64, 64)


def test_env_prints_versions_and_what_would_run(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for key in (*results.ENVIRONMENT, "machine", "model"):
        assert f"\n{key} " in f"\n{printed}"
    assert torch.__version__ in printed
    assert ("its kernels are for CUDA devices" in printed) == (not torch.cuda.is_available())


def test_report_adds_writes_and_checks(capsys, tmp_path, monkeypatch):
    (tmp_path / "figures" / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- sdopt table cpu-2-cores/pocket-path -->\n<!-- /sdopt -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert main(["report", "--add", str(run_folder(tmp_path / "out"))]) == 0
    assert main(["report", "--check"]) == 0
    path = tmp_path / "figures" / "data" / "cpu-2-cores" / "pocket-path.json"
    changed = json.loads(path.read_text())
    changed["rows"][0]["latency_s"]["median"] = 3.0
    path.write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["report", "--check"]) == 1
    out, err = capsys.readouterr()
    assert "stale: " in out
    assert "run `sdopt report`" in err


def test_the_readme_and_the_figures_match_the_recorded_measurements():
    assert report.stale() == []
