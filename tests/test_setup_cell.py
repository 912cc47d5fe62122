"""The notebooks' set-up cell, run against environments made of stubs: it fetches the course and never touches torch."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NEEDS_TORCH = ("accelerate", "peft", "torchmetrics")


def stub(folder, name, version, *needs):
    """A wheel with a name, a version and what it needs, and nothing inside."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = "\n".join(
        ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    )
    wheel = "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as file:
        for part, text in (("METADATA", metadata), ("WHEEL", wheel), ("RECORD", "")):
            file.writestr(f"{info}/{part}", text)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What the set-up cell would run where sdopt is missing, with a torch of `version`: [git, pip]."""

    def collect(version):
        cell = nbformat.read(next((ROOT / "notebooks").glob("*.ipynb")), 4).cells[1].source
        run = []
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            patch.setattr(importlib.metadata, "version", lambda name: version)
            patch.setattr(subprocess, "run", lambda command, check: run.append(command))
            patch.setattr(sys, "path", list(sys.path))
            exec(compile(cell, "set-up", "exec"), {})
        return run

    return collect


def dry_run(tmp_path, pip, torch):
    """Ask pip what the command would install beside a torch of that version; (exit code, report or None, errors)."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    for part in ("setuptools", "_distutils_hack", importlib.metadata.distribution("setuptools")._path.name):
        source = Path(importlib.util.find_spec("setuptools").origin).parents[1] / part
        shutil.copytree(source, packages / part)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version:
            stub(wheels, name, version.split(";")[0].strip(), *(["torch>=2"] if name in NEEDS_TORCH else []))
    stub(wheels, "torch", "99.0")  # newer than any, should anything be tempted
    stub(tmp_path, "torch", torch)
    with zipfile.ZipFile(tmp_path / f"torch-{torch}-py3-none-any.whl") as file:
        file.extractall(packages)
    course = tmp_path / "sdopt-course"
    (course / "sdopt").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "sdopt/__init__.py"):
        shutil.copy(ROOT / name, course / name)
    assert pip[:4] == [sys.executable, "-m", "pip", "install"]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--report", str(report),
         "--no-index", "--find-links", str(wheels), "--no-build-isolation", *pip[4:]],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, json.loads(report.read_text()) if report.exists() else None, done.stdout


@pytest.mark.parametrize("torch", ["2.12.1", "2.11.0+cu130"])
def test_the_torch_that_is_there_stays(tmp_path, commands, torch):
    git, pip = commands(torch)
    assert git[:2] == ["git", "clone"] and git[-1] == "sdopt-course"
    code, report, errors = dry_run(tmp_path, pip, torch)
    assert code == 0, errors
    installed = {item["metadata"]["name"].lower() for item in report["install"]}
    assert "torch" not in installed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(needed).name for needed in project["dependencies"]} - {"torch"}
    assert installed == wanted | {"sdopt"}


def test_a_torch_too_old_is_refused_not_replaced(tmp_path, commands):
    code, report, errors = dry_run(tmp_path, commands("2.4.0")[1], "2.4.0")
    assert code != 0 and "torch" in errors, errors
    assert report is None


def test_where_sdopt_is_there_nothing_runs(monkeypatch):
    cell = nbformat.read(next((ROOT / "notebooks").glob("*.ipynb")), 4).cells[1].source
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("the set-up cell ran a command"))
    for _ in range(2):
        exec(compile(cell, "set-up", "exec"), {})
