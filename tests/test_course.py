"""The notebooks as files: their anatomy, their outputs, their exercises. What each kept is in test_notebook_NN.py."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
import torch

from made_up import kernels, row

from sdopt import course
from sdopt.course import KEPT
from sdopt.exercises import _all, check
from sdopt.notebooks import address
from sdopt.widgets import VIEW

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXERCISES = sorted(_all())

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def solution(name):
    path = next((ROOT / "notebooks" / "solutions").glob(f"{name[:2]}_*.py"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each
def test_anatomy(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert 25 <= len(notebook.cells) <= 40
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    first, setup = notebook.cells[0].source, notebook.cells[1].source
    assert first.startswith("# ") and "You will learn" in first and "**Needs**" in first
    assert f"colab.research.google.com/github/{address()}/blob/main/notebooks/{path.name}" in first
    assert f"https://github.com/{address()}" in setup
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for heading in (
        "## Predict",
        "## Measure",
        "## Break it",
        "## The row this step adds",
        "**Takeaways**",
        "## Exercises",
    ):
        assert heading in prose, heading
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (path.parent / target).exists(), f"a link to {target}, which is not there"


def test_one_set_up_cell_for_all():
    setups = {nbformat.read(path, 4).cells[1].source for path in NOTEBOOKS}
    assert len(setups) == 1
    assert len([line for line in setups.pop().splitlines() if line.strip()]) <= 10


@each
def test_outputs_are_clean(path):
    assert path.stat().st_size < 2**20
    for cell in code(path):
        assert cell.execution_count and "execution" not in cell.metadata, cell.source
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", []), cell.source
            assert output.get("name") != "stderr", output
            data = output.get("data", {"text/plain": output.get("text", "")})
            assert VIEW not in data
            text = " ".join(str(value) for kind, value in data.items() if not kind.startswith("image/"))
            assert not re.search(r"/(?:home|root|work|tmp|usr)/|Warning\b", text), text


@each
def test_exercises_are_asked_and_their_stubs_told_wrong(path):
    asked = {}
    for cell in code(path):
        for name in re.findall(r'check\("(\d\d\.\d)", answer\)', cell.source):
            asked[name] = "".join(output.get("text", "") for output in cell.outputs)
    assert sorted(asked) == [name for name in EXERCISES if name.startswith(path.name[:2])] and len(asked) >= 2
    assert all(f"{name}: not answered yet" in text for name, text in asked.items())


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_mistakes_are_not(name, capsys):
    solved = solution(name)
    assert not check(name, ...)
    assert check(name, solved.ANSWERS[name])
    assert len(solved.MISTAKES[name]) >= 2
    for mistake in solved.MISTAKES[name]:
        assert not check(name, mistake), mistake


@each
def test_key_results_are_kept(path):
    names = [o["data"][KEPT]["name"] for cell in code(path) for o in cell.outputs if KEPT in o.get("data", {})]
    assert names == [path.stem]


def test_every_term_of_the_glossary_is_linked_and_every_link_finds_its_term():
    terms = re.findall(r"^### (.+)$", (ROOT / "notebooks" / "GLOSSARY.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-") for term in terms}  # as GitHub makes them
    prose = [c.source for path in NOTEBOOKS for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    assert set(re.findall(r"GLOSSARY\.md#([\w-]+)\)", "\n".join(prose))) == anchors


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    "odd", [None, "x", float("nan"), (1, 2), torch.zeros(2), lambda *a, **k: 1 / 0, lambda x: x, object()]
)
def test_odd_answers_are_told_wrong_in_one_line(name, odd, capsys):
    assert not check(name, odd)
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ") and said.count("\n") == 1 and len(said) < 320


def test_a_recorded_row_that_waited_for_its_cpu_says_so_under_the_table(monkeypatch):
    shown = []
    monkeypatch.setattr(course, "display", lambda page: shown.append(page.data))
    before, waited = (row(i, s, unet_kernels=[kernels(2, 20.0)]) for i, s in (("dpm_20", 1.0), ("cfg_cutoff", 1.6)))
    course.table([], [("a", before), ("a", waited)])
    course.table([], [("a", before), ("b", waited)])
    assert "- recorded: a, cfg_cutoff, beside dpm_20: its kernels are busy for 600 ms of the UNet's 1360" in shown[0]
    assert "busy" not in shown[1], "of another machine"
