import numpy as np
import pytest
from made_up import peers_result, run_folder
from PIL import Image

from sdopt import figures, peerfigures, results
from sdopt.errors import UserError


def drawn(tmp_path, draw, made, monkeypatch):
    """The PNG of a study, and the words in it."""
    shown = []
    save = figures.save

    def keep(figure, target, files):
        shown.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        shown.append(figure.get_suptitle())
        save(figure, target, files)

    monkeypatch.setattr(figures, "save", keep)
    file = run_folder(tmp_path, made) / "sdxl-peers.json"
    draw(file, tmp_path / "figure.png")
    assert figures.source(tmp_path / "figure.png") == figures.digest([file])
    return tmp_path / "figure.png", shown


@pytest.mark.parametrize("draw", [peerfigures.peers_figure, peerfigures.attention_figure])
def test_a_figure_is_a_readable_png_that_names_noise_and_failures(tmp_path, draw, monkeypatch):
    target, shown = drawn(tmp_path, draw, peers_result(), monkeypatch)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert (pixels < 200).mean() > 0.05, "something is drawn"
    assert any("random weights" in words for words in shown)
    assert any(words.startswith("failed: xformers cannot attend here") for words in shown)


def test_peers_are_shown_with_median_ratio_and_first_call(tmp_path, monkeypatch):
    _, shown = drawn(tmp_path, peerfigures.peers_figure, peers_result(), monkeypatch)
    assert {"2.00 s", "1.60 s   1.25x", "4.00 s   0.50x", "160 s, warm 16.00 s", "6.00 s"} <= set(shown)


def test_backends_are_shown_by_the_time_of_a_unet_call(tmp_path, monkeypatch):
    made = peers_result()
    for row in made["rows"]:
        row.pop("unet_kernels", None)
    _, shown = drawn(tmp_path, peerfigures.attention_figure, made, monkeypatch)
    assert {"56.7 ms   ran: cudnn", "113.3 ms   0.50x   ran: math", "62.3 ms   0.91x   ran: flash"} <= set(shown)


def test_backends_are_shown_by_their_kernels_where_a_profile_knows_them(tmp_path, monkeypatch):
    made = peers_result()
    for n, row in enumerate(made["rows"]):
        if row["status"] == "ok":
            row["unet_kernels"] = [{"samples": 2, "ms": {"attention": 1.0 + n, "other": 9.0}}]
    _, shown = drawn(tmp_path, peerfigures.attention_figure, made, monkeypatch)
    order = [row["id"] for row in made["rows"]]
    picked, math = (10.0 + order.index(i) for i in ("eager_bf16", "sdpa_math"))
    assert {f"{picked:.1f} ms   ran: cudnn", f"{math:.1f} ms   {picked / math:.2f}x   ran: math"} <= set(shown)


@pytest.mark.parametrize("draw", [peerfigures.peers_figure, peerfigures.attention_figure])
@pytest.mark.parametrize("kept", [slice(0, 1), slice(9, None), slice(0, 0)])
def test_a_study_of_which_little_worked_is_drawn_all_the_same(tmp_path, draw, kept, monkeypatch):
    made = peers_result()
    made["rows"] = made["rows"][kept]
    target, shown = drawn(tmp_path, draw, made, monkeypatch)
    assert target.exists()
    assert not any("x" in words and "ms" in words for words in shown), "no ratio without a reference"


def test_a_result_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError):
        peerfigures.peers_figure(tmp_path / "x.json", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_kernels_that_are_not_known_are_left_unnamed(tmp_path):
    told = peers_result()
    for row in told["rows"]:
        row.get("as_run", {})["attention"] = None
    results.write(tmp_path / "sdxl-peers.json", told)
    peerfigures.attention_figure(tmp_path / "sdxl-peers.json", tmp_path / "attention.png")
    assert (tmp_path / "attention.png").exists()
