import numpy as np
import pytest
from made_up import break_even_result, run_folder, stages_result
from PIL import Image

from sdopt import breakeven, figures, report, rooflinefigures
from sdopt.errors import UserError

DRAWN = [(stages_result, rooflinefigures.roofline_figure), (break_even_result, breakeven.break_even_figure)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws a made-up study and returns the figure it saved."""
    saved, save = [], figures.save

    def keep(figure, target, files):
        saved.append(figure)
        save(figure, target, files)

    monkeypatch.setattr(figures, "save", keep)

    def draw(made):
        file = run_folder(tmp_path, made) / f"{made['study']}.json"
        sources, drawings = report._drawings(file)
        assert sources == [file] and list(drawings) == [""]
        drawings[""](tmp_path / "figure.png")
        assert figures.source(tmp_path / "figure.png") == figures.digest([file])
        return saved[-1]

    return draw


def words(axes):
    return [text.get_text() for text in axes.texts if text.get_visible()]


@pytest.mark.parametrize("made", [stages_result, break_even_result])
def test_a_figure_is_a_readable_png_that_names_noise(made, drawn, tmp_path):
    assert "random weights" in drawn(made()).get_suptitle()
    with Image.open(tmp_path / "figure.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300 and (pixels < 200).mean() > 0.01


def test_every_stage_with_flops_has_a_marker_measured_and_predicted_under_its_ceilings(drawn):
    figure = drawn(stages_result())
    text, unet, vae = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["text encoder", "UNet", "VAE decode"]
    marks = [line for line in unet.lines if line.get_marker() == "o"]
    assert len(marks) == 2 * 10
    hollow = [line for line in marks if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow[:2]] == pytest.approx([175 / 0.6, 200 / 0.6]), "TFLOP/s as predicted"
    solid = [line for line in marks if line not in hollow]
    assert (solid[3].get_xdata()[0], solid[3].get_ydata()[0]) == pytest.approx((200, 200 / 1.36))
    assert {"bfloat16, 700 TFLOP/s", "float32, 50 TFLOP/s", "TF32, 400 TFLOP/s", "a copy, 4,000 GB/s"} <= set(words(unet))
    assert "bfloat16, 700 TFLOP/s" in words(vae) and "TF32, 400 TFLOP/s" not in words(text), "what nothing used is left out"
    labelled = ", ".join(label for label in words(unet) if label[0].isdigit() or label == "e")
    assert {"1", "2", "e"} <= set(labelled.replace(",", "").split()) and "1 baseline_fp32" in unet.get_xlabel()
    assert unet.get_xscale() == unet.get_yscale() == "log"


def test_numbers_that_follow_one_another_are_told_by_their_ends():
    assert rooflinefigures._listed(["2", "4", "5", "6", "e", "E"]) == "2, 4-6, e, E"
    assert rooflinefigures._listed(["4", "5"]) == "4, 5"


def test_each_way_is_a_line_and_a_dot_where_it_has_paid(drawn):
    (axes,) = drawn(break_even_result()).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [548, 38, 386, 26, 5] and len(axes.lines) == 8 + 5
    assert words(axes) == ["548", "38", "386", "26", "5"]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named[0] == "eager_bf16" and "compile_regional: never" in named and "engine_bf16: 5 pictures" in named
    assert [line.get_linestyle() for line in axes.lines if line not in dots] == ["-", *["-", "--"] * 3, "-"]


@pytest.mark.parametrize(("made", "draw"), DRAWN)
@pytest.mark.parametrize("kept", [slice(0, 1), slice(4, 5), slice(0, 0)])
def test_a_study_of_which_little_worked_is_drawn_all_the_same(made, draw, kept, tmp_path):
    told = made()
    told["rows"] = told["rows"][kept]
    draw(run_folder(tmp_path, told) / f"{told['study']}.json", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(("made", "draw"), DRAWN)
def test_a_result_file_that_is_none_is_refused(made, draw, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError):
        draw(tmp_path / "x.json", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
