import io

import numpy as np
import pytest
from matplotlib.transforms import Bbox
from PIL import Image

from sdopt import figures


def labels(plot):
    """The visible labels of a scatter plot, and where they stand in pixels."""
    plot.draw_without_rendering()
    axes = plot.axes[0]
    shown = [text for text in axes.texts if text.get_visible()]
    return [text.get_text() for text in shown], [text.get_window_extent() for text in shown], axes


def test_labels_of_close_points_cover_neither_each_other_nor_the_edge():
    points = [
        {"label": f"point {n}", "x": x, "y": y} for n, (x, y) in enumerate([(1, 1), (1.01, 1.02), (9, 5), (9.02, 5)])
    ]
    texts, boxes, axes = labels(figures.scatter(points, "x", "y"))
    assert texts == ["point 0", "point 1", "point 2", "point 3"]
    for k, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:k] + boxes[k + 1 :]) == 0
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


def test_a_series_has_a_colour_a_line_and_a_place_in_the_legend():
    points = [{"label": "", "x": x, "y": x, "series": s, "low": x - 1, "high": x + 2} for s in "ab" for x in (1, 2)]
    plot = figures.scatter(points, "seconds", "share")
    assert [text.get_text() for text in plot.legends[0].get_texts()] == ["a", "b"]
    lines = [line for line in plot.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert len({line.get_color() for line in lines}) == 2
    (spread,) = {tuple(np.ptp(path.vertices[:, 1]) for path in bar.get_paths()) for bar in plot.axes[0].collections}
    assert spread == pytest.approx((3, 3)), "the interval is drawn as it is given"


def test_plots_are_pictures():
    plot = figures.scatter([{"label": "one", "x": 1, "y": 1}], "x", "y")
    assert plot._repr_png_().startswith(b"\x89PNG")
    assert isinstance(plot.axes[0].bbox.frozen(), Bbox)


def test_a_chart_is_kept_with_a_palette_and_pictures_of_things_are_not():
    bars, picture = figures.Plot(), figures.Plot()
    bars.subplots().bar([0, 1], [1, 2], color=figures.SERIES[:2])
    picture.subplots().imshow(np.random.default_rng(0).random((100, 100, 3)))
    small, full = (Image.open(io.BytesIO(figures.png(figure, 110))) for figure in (bars, picture))
    assert (small.mode, full.mode) == ("P", "RGB") and small.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
