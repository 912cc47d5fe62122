import base64
import io

import pytest
from PIL import Image

from sdopt import widgets
from sdopt.errors import UserError

RED, BLUE = (Image.new("RGB", (400, 200), colour) for colour in ("red", "blue"))


def still(widget):
    return Image.open(io.BytesIO(base64.b64decode(widget._repr_mimebundle_()["image/png"]))).convert("RGB")


def test_the_border_moves_and_a_still_picture_shows_both():
    widget = widgets.slider(RED, BLUE)
    assert widgets.VIEW in widget._repr_mimebundle_()
    assert still(widget).getpixel((20, 100)) == (255, 0, 0) and still(widget).getpixel((370, 100)) == (0, 0, 255)
    _, shown, border = widget.children
    border.value = 0.1
    assert Image.open(io.BytesIO(shown.value)).getpixel((100, 100)) == (0, 0, 255)
    border.value = 1.0
    assert Image.open(io.BytesIO(shown.value)).getpixel((300, 100)) == (255, 0, 0)
    with pytest.raises(UserError, match="draw them alike"):
        widgets.slider(RED, BLUE.resize((200, 200)))


def test_the_explorer_shows_the_picture_of_its_sliders():
    pictures = {
        (steps, cut): Image.new("RGB", (16, 16), (steps, int(100 * cut), 0))
        for steps in (5, 10)
        for cut in (0.0, 0.5, 1.0)
    }
    widget = widgets.explorer(pictures, captions={(5, 0.5): "here"})
    steps, cut, shown, caption = widget.children
    assert (steps.value, cut.value) == (10, 1.0)
    steps.value, cut.value = 5, 0.5
    assert Image.open(io.BytesIO(shown.value)).getpixel((8, 8)) == (5, 50, 0) and caption.value == "here"
    grid = still(widget)
    assert grid.size == (3 * 128, 2 * 128) and grid.getpixel((384 - 64, 64)) == (5, 100, 0)
    del pictures[5, 0.5]
    with pytest.raises(UserError, match="no picture for steps 5 and cutoff 0.5"):
        widgets.explorer(pictures)
    with pytest.raises(UserError, match="draw some first"):
        widgets.explorer({})
