import shutil

import nbformat
import pytest

from sdopt import course, notebooks
from sdopt.errors import UserError
from sdopt.report import ROOT
from sdopt.widgets import VIEW


def write(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells]), path)
    return path


def test_a_notebook_runs_in_place_and_its_outputs_are_clean(tmp_path):
    path = write(tmp_path / "a.ipynb", "x = 1", "from sdopt import course\ncourse.keep('a', x=x + 1)", "x")
    assert notebooks.main(["execute", str(path)]) == 0
    done = nbformat.read(path, 4)
    assert [cell.execution_count for cell in done.cells] == [1, 2, 3]
    assert done.cells[1].outputs[0]["data"][course.KEPT] == {"name": "a", "values": {"x": 2}}
    assert all("execution" not in cell.metadata for cell in done.cells)
    assert done.metadata.language_info == {"name": "python"}


def test_a_notebook_that_stops_is_left_as_it_was(tmp_path, capsys):
    path = write(tmp_path / "a.ipynb", "1 / 0")
    before = path.read_bytes()
    assert notebooks.main(["execute", str(path)]) == 2
    assert "a.ipynb stopped: ZeroDivisionError" in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize("what", ["missing", "no notebook", "its kernel dies"])
def test_a_notebook_that_cannot_be_run_is_told_in_one_line(tmp_path, capsys, what):
    path = tmp_path / "some.ipynb"
    if what == "no notebook":
        path.write_text("{")
    elif what != "missing":
        write(path, "import os; os._exit(1)")
    assert notebooks.main(["execute", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sdopt: ") and "some.ipynb" in said


def test_widget_states_and_views_are_not_committed():
    cell = nbformat.v4.new_code_cell("w", metadata={"execution": {"iopub.status.busy": "now"}})
    cell.outputs = [nbformat.v4.new_output("display_data", {VIEW: {"model_id": "1"}, "image/png": "aGk="})]
    cleaned = notebooks.clean(nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}}))
    assert list(cleaned.cells[0].outputs[0]["data"]) == ["image/png"] and "widgets" not in cleaned.metadata


def test_the_address_stands_in_one_place_and_is_stamped_everywhere(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = notebooks.address(tmp_path)
    changed = notebooks.stamp("ada/fast-pictures", tmp_path)
    assert notebooks.address(tmp_path) == "ada/fast-pictures"
    found = sorted((tmp_path / "notebooks").glob("*.ipynb"))
    assert found and set(found) <= set(changed)
    for path in found:
        text = path.read_text()
        assert old not in text and "github/ada/fast-pictures/blob" in text and "github.com/ada/fast-pictures" in text
    assert notebooks.stamp("ada/fast-pictures", tmp_path) == []
    with pytest.raises(UserError, match="give owner/name"):
        notebooks.stamp("nobody", tmp_path)
