import numpy as np
import pytest
from made_up import IDS, result, run_folder
from PIL import Image

from sdopt import figures, pathfigures, results
from sdopt.errors import UserError


def drawn(tmp_path, draw, **settings):
    folder = run_folder(tmp_path / "run", **settings)
    target = tmp_path / "figure.png"
    draw(folder / "pocket-path.json", folder / "pocket-path", target)
    return folder, target


@pytest.mark.parametrize("draw", [pathfigures.path_figure, pathfigures.before_and_after])
def test_a_figure_is_a_readable_png_that_knows_its_source(tmp_path, draw):
    folder, target = drawn(tmp_path, draw)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert (pixels < 200).mean() > 0.05, "something is drawn"
    assert pathfigures.source(target) == pathfigures.digest(folder / "pocket-path.json", folder / "pocket-path")


def test_another_measurement_or_another_picture_is_another_source(tmp_path):
    folder = run_folder(tmp_path)
    seen = {pathfigures.digest(folder / "pocket-path.json", folder / "pocket-path")}
    Image.new("RGB", (16, 16), "white").save(folder / "pocket-path" / f"9-{IDS[-1]}.png")
    seen.add(pathfigures.digest(folder / "pocket-path.json", folder / "pocket-path"))
    changed = result()
    changed["rows"][0]["first_call_s"] += 1
    results.write(folder / "pocket-path.json", changed)
    seen.add(pathfigures.digest(folder / "pocket-path.json", folder / "pocket-path"))
    assert len(seen) == 3


def test_a_figure_without_a_source_or_no_figure_has_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert pathfigures.source(tmp_path / "plain.png") is None
    assert pathfigures.source(tmp_path / "absent.png") is None


def test_a_failed_row_leaves_a_gap_not_an_old_picture(tmp_path):
    folder = run_folder(tmp_path)
    failed = result()
    failed["rows"][5] = {"id": "int8", "label": "int8", "settings": {}, "status": "failed: out of memory"}
    results.write(folder / "pocket-path.json", failed)
    pathfigures.path_figure(folder / "pocket-path.json", folder / "pocket-path", folder / "figure.png")
    before = pathfigures.source(folder / "figure.png")
    (folder / "pocket-path" / "6-int8.png").unlink()
    assert pathfigures.digest(folder / "pocket-path.json", folder / "pocket-path") == before


def test_random_weights_are_named():
    assert "random weights" in figures.described(result(weights="random"))
    assert "random weights" not in figures.described(result())


def test_a_result_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError):
        pathfigures.path_figure(tmp_path / "x.json", tmp_path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
