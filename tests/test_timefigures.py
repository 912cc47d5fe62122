import numpy as np
import pytest
from made_up import IDS, bench_result, peers_result, result, run_folder
from PIL import Image

from sdopt import figures, timefigures
from sdopt.errors import UserError


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that draws a made-up study and returns the figure it saved, and its two halves."""
    saved, save = [], figures.save

    def keep(figure, target, files):
        saved.append(figure)
        save(figure, target, files)

    monkeypatch.setattr(figures, "save", keep)

    def drawn(made, what):
        file = run_folder(tmp_path, made) / f"{made['study']}.json"
        what(file, file.with_suffix(""), tmp_path / "figure.png")
        return saved[-1], *saved[-1].axes

    return drawn


def names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_stages_are_shown_as_shares_and_milliseconds(draw):
    _, shares, table = draw(result(), timefigures.stages_figure)
    widths = [bar.get_width() for bar in shares.patches]
    assert names(shares) == list(IDS) and len(widths) == 5 * len(IDS)
    assert sum(widths[:5]) == pytest.approx(100)
    assert widths[1] == pytest.approx(100 * 3400 / 4000)
    assert words(table)[:6] == ["9.0", "3,400", "6.0", "360", "225", "4,000"]


def test_kernels_are_shown_for_each_batch_that_a_row_sees(draw, tmp_path):
    figure, shares, table = draw(bench_result(), timefigures.kernels_figure)
    assert names(shares)[7:10] == ["dpm_20", "cfg_cutoff (2 at once)", "cfg_cutoff (1 at once)"]
    assert [bar.get_width() for bar in shares.patches[:4]] == pytest.approx([50, 20, 10, 20])
    assert words(table)[:5] == ["5.0", "2.0", "1.0", "2.0", "10.0"], "products, convolutions, attention, others, sum"
    assert "random weights" in figure.get_suptitle()
    with Image.open(tmp_path / "figure.png") as image:
        assert (np.asarray(image.convert("L")) < 200).mean() > 0.05, "something is drawn"


def test_a_peer_that_failed_has_no_kernels_to_show(draw):
    _, shares, _ = draw(peers_result(), timefigures.kernels_figure)
    assert "eager_bf16" in names(shares) and "xformers" not in names(shares)


def test_a_result_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError):
        timefigures.kernels_figure(tmp_path / "x.json", tmp_path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_kernel_waits_for_its_launch_and_for_the_one_before():
    assert timefigures.queue([2, 2, 2], [1, 5, 1]) == [(2, 3), (4, 9), (9, 10)]
    assert timefigures.queue([2, 0, 0], [1, 5, 1]) == [(2, 3), (3, 8), (8, 9)], "a graph leaves no gaps"


def test_lanes_show_who_works_when_and_how_busy_the_gpu_is():
    plot = timefigures.lanes({"apart": ([3e-6] * 2, [1e-6] * 2), "graph": ([3e-6, 0], [1e-6] * 2)})
    (axes,) = plot.axes
    assert names(axes) == ["apart: CPU", "apart: GPU", "graph: CPU", "graph: GPU"]
    spans = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert spans == [pytest.approx(s) for s in [(0, 3), (3, 3), (3, 1), (6, 1), (0, 3), (3, 1), (4, 1)]]
    assert words(axes) == [" 7.0 us, the GPU busy 29% of them", " 5.0 us, the GPU busy 40% of them"]
    axes.figure.draw_without_rendering()
    for text in axes.texts:
        assert text.get_window_extent().x1 <= axes.bbox.x1
