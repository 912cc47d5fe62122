import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name):
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return {r.name.lower().replace("_", "-"): r for r in (Requirement(x) for x in lines if x and x[0] != "#")}


def test_requirements_are_what_the_package_and_its_extras_ask_for():
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = [*PROJECT["project"]["dependencies"], *(r for extra in extras for r in extra)]
    asked += PROJECT["build-system"]["requires"]
    assert {str(r) for r in requirements("requirements.txt").values()} == {str(Requirement(r)) for r in asked}


def test_constraints_are_exact_and_within_the_ranges():
    exact = requirements("constraints.txt")
    assert all(re.fullmatch(r"==[^*]+", str(r.specifier)) for r in exact.values())
    assert str(exact["torch"].specifier) == "==2.13.0"
    for name, wanted in requirements("requirements.txt").items():
        version = next(iter(exact[name].specifier)).version
        assert wanted.specifier.contains(version), name


def test_torch_has_no_upper_cap():
    assert str(requirements("requirements.txt")["torch"].specifier) == ">=2.11"


def test_an_interrupted_installation_is_not_taken_for_done():
    recipe = (ROOT / "Makefile").read_text().split("$(INSTALLED): ")[1].split("\n\n")[0].splitlines()
    assert {"constraints.txt", "pyproject.toml"} <= set(recipe[0].split())
    assert recipe[1].strip() == "rm -f $@"
    assert recipe[-1].strip() == "touch $@"


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_sets_up_before_anything_else(target, tmp_path):
    # as typed in a shell: under `make test` an outer make would hand its own flags down
    alone = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    commands = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    torch_first = next(n for n, line in enumerate(commands) if "pip install" in line)
    assert commands[torch_first].endswith("-c constraints.txt setuptools torch")
    if target == "run":
        assert commands[-1].endswith("run --model pocket --out out")
        return
    notebooks, tests = commands[-2:]
    assert "pytest -q -n 2 --dist loadfile --no-loadscope-reorder " in tests and "pytest -q -n 2 " in notebooks
    *first, everything = tests.split("reorder ")[1].split()
    assert everything == "tests" and all((ROOT / path).exists() for path in first)
    named = notebooks.split(" -n 2 ")[1].split()
    assert sorted(named) == sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")), "each once"
