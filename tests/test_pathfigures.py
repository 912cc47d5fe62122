import numpy as np
import pytest
from made_up import IDS, bench_result, result, run_folder
from PIL import Image

from sdopt import figures, pathfigures, results, timefigures
from sdopt.errors import UserError

ALL = [pathfigures.path_figure, timefigures.stages_figure, pathfigures.before_and_after]


def drawn(tmp_path, draw, made=None):
    made = made or result()
    folder, target = run_folder(tmp_path / "run", made), tmp_path / "figure.png"
    file = folder / f"{made['study']}.json"
    draw(file, file.with_suffix(""), target)
    assert figures.source(target) == figures.digest(pathfigures.sources(file, file.with_suffix("")))
    return folder, target


@pytest.fixture
def shown(monkeypatch):
    """The figures that were saved, instead of files."""
    saved = []
    monkeypatch.setattr(figures, "save", lambda figure, target, files: saved.append(figure))
    return saved


def draw(made, tmp_path, what):
    file = run_folder(tmp_path, made) / f"{made['study']}.json"
    what(file, file.with_suffix(""), tmp_path / "figure.png")


@pytest.mark.parametrize("draw", ALL)
def test_a_figure_is_a_readable_png_that_knows_its_source(tmp_path, draw):
    _, target = drawn(tmp_path, draw)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert (pixels < 200).mean() > 0.05, "something is drawn"


def test_another_measurement_or_another_picture_is_another_source(tmp_path):
    folder = run_folder(tmp_path)
    digest = lambda: figures.digest(pathfigures.sources(folder / "pocket-path.json", folder / "pocket-path"))
    seen = {digest()}
    Image.new("RGB", (16, 16), "white").save(folder / "pocket-path" / f"9-{IDS[-1]}.png")
    seen.add(digest())
    changed = result()
    changed["rows"][0]["first_call_s"] += 1
    results.write(folder / "pocket-path.json", changed)
    seen.add(digest())
    assert len(seen) == 3


def test_a_figure_without_a_source_or_no_figure_has_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert figures.source(tmp_path / "plain.png") is None
    assert figures.source(tmp_path / "absent.png") is None


def test_a_failed_row_leaves_a_gap_not_an_old_picture(tmp_path):
    failed = result()
    failed["rows"][5] = {"id": "int8", "label": "int8", "settings": {}, "status": "failed: out of memory"}
    folder, target = drawn(tmp_path, pathfigures.path_figure, failed)
    assert (folder / "pocket-path" / "6-int8.png").exists()
    (folder / "pocket-path" / "6-int8.png").unlink()
    file = folder / "pocket-path.json"
    assert figures.digest(pathfigures.sources(file, folder / "pocket-path")) == figures.source(target)


def test_pictures_are_the_steps_and_the_recommended_path(tmp_path, shown):
    draw(bench_result(weights="hub"), tmp_path, pathfigures.path_figure)
    strip = [axes for axes in shown[0].axes if axes.images]
    assert [axes.get_title() for axes in strip] == [*IDS, "recommended"]


def test_noise_has_no_strip_of_pictures_and_is_named(tmp_path, shown):
    draw(bench_result(), tmp_path, pathfigures.path_figure)
    assert len(shown[0].axes) == 1
    assert "random weights" in shown[0].get_suptitle()


def test_before_and_after_are_the_ends_of_the_nine_steps(tmp_path, shown):
    draw(bench_result(weights="hub"), tmp_path, pathfigures.before_and_after)
    assert [axes.get_title() for axes in shown[0].axes] == ["the baseline: 4.00 s", "after 8 more steps: 0.800 s"]


@pytest.mark.parametrize("what", [pathfigures.path_figure, timefigures.stages_figure])
def test_a_path_of_which_nothing_worked_is_drawn_all_the_same(tmp_path, shown, what):
    failed = result()
    failed["rows"] = [{"id": "bf16", "label": "bf16", "settings": {}, "status": "failed: out of memory"}]
    draw(failed, tmp_path, what)
    assert "failed: out of memory" in [text.get_text() for text in shown[0].axes[0].texts]


def test_random_weights_are_named():
    assert "random weights" in figures.described(result(weights="random"))
    assert "random weights" not in figures.described(result())


@pytest.mark.parametrize("draw", ALL)
def test_a_result_file_that_is_none_is_refused(tmp_path, draw):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError):
        draw(tmp_path / "x.json", tmp_path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
