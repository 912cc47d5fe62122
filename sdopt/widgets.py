"""Two things to play with, each with a still picture for where no widget manager runs (GitHub, exported pages)."""

import base64
import io

import ipywidgets
from PIL import Image, ImageDraw, ImageFont

from sdopt.errors import UserError

VIEW = "application/vnd.jupyter.widget-view+json"


class WithStill(ipywidgets.VBox):
    """A widget whose output also holds a PNG: a page without a widget manager shows that."""

    def __init__(self, children, still: Image.Image):
        super().__init__(children)
        self._still = still

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        still = self._still.quantize(256)  # a third of the size, and hardly seen
        return bundle | {"image/png": base64.b64encode(_encoded(still)).decode()}


def slider(before: Image.Image, after: Image.Image, labels=("before", "after")) -> WithStill:
    """Two pictures of one size in one, with a slider that moves the border between them.

    Raises UserError when the sizes differ. Introduced in notebooks/07_tiny_vae.
    """
    if before.size != after.size:
        raise UserError(f"cannot lay a picture of {after.size} over one of {before.size}: draw them alike")
    width = min(2 * before.width, 768)
    shown = ipywidgets.Image(value=_encoded(split(before, after, 0.5)), format="png", width=width)
    border = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.01, readout=False, layout={"width": f"{width}px"})

    def move(change):
        shown.value = _encoded(split(before, after, change["new"]))

    border.observe(move, names="value")
    still = split(before, after, 0.5)
    _write(still, (4, still.height - 4), labels[0], "lb")
    _write(still, (still.width - 4, still.height - 4), labels[1], "rb")
    return WithStill([ipywidgets.Label(f"left: {labels[0]}, right: {labels[1]}"), shown, border], still)


def split(before: Image.Image, after: Image.Image, share: float) -> Image.Image:
    """The left `share` of `before`, the rest of `after`, and a white line between."""
    border = round(share * before.width)
    joined = after.convert("RGB")
    joined.paste(before.convert("RGB").crop((0, 0, border, before.height)), (0, 0))
    joined.paste("white", (max(0, border - 1), 0, min(before.width, border + 1), before.height))
    return joined


def explorer(pictures: dict, names=("steps", "cutoff"), captions: dict | None = None) -> WithStill:
    """A slider for each of two settings, and the picture drawn with them.

    `pictures`: {(first, second): PIL image}, every combination of its values; `captions` may say more of each. The
    still picture is the whole grid. Raises UserError when a combination is missing, or all are. Introduced in
    notebooks/09_cfg_cutoff.
    """
    if not pictures:
        raise UserError("there are no pictures to explore: draw some first")
    values = [sorted({key[axis] for key in pictures}) for axis in (0, 1)]
    for key in ((a, b) for a in values[0] for b in values[1]):
        if key not in pictures:
            raise UserError(f"there is no picture for {names[0]} {key[0]} and {names[1]} {key[1]}: draw it too")
    sliders = [
        ipywidgets.SelectionSlider(options=options, value=options[-1], description=name)
        for options, name in zip(values, names)
    ]
    shown, caption = ipywidgets.Image(format="png"), ipywidgets.Label()

    def show(change=None):
        key = tuple(s.value for s in sliders)
        shown.value = _encoded(pictures[key])
        caption.value = (captions or {}).get(key, "")

    for s in sliders:
        s.observe(show, names="value")
    show()
    return WithStill([*sliders, shown, caption], sheet(pictures, values, names))


def sheet(pictures: dict, values, names, side: int = 128) -> Image.Image:
    """All pictures in one: the first setting downwards, the second to the right, each picture with its two values."""
    whole = Image.new("RGB", (side * len(values[1]), side * len(values[0])))
    for row, a in enumerate(values[0]):
        for column, b in enumerate(values[1]):
            corner = side * column, side * row
            whole.paste(pictures[a, b].convert("RGB").resize((side, side), Image.LANCZOS), corner)
            _write(whole, (corner[0] + 4, corner[1] + 3), f"{names[0]} {a}, {names[1]} {b}", "la")
    return whole


def _write(picture, at, text, anchor):
    ImageDraw.Draw(picture).text(
        at, text, "white", ImageFont.load_default(11), anchor, stroke_width=1, stroke_fill="black"
    )


def _encoded(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
