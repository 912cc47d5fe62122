from sdopt import kernelfigures


def test_each_fusion_has_a_bar_for_its_operations_and_one_for_its_kernel():
    counted = {"group_norm": ({"native_group_norm": 3.0, "silu": 2.0}, 3.0), "geglu": ({"gelu": 2.0, "mul": 3.0}, 3.0)}
    figure = kernelfigures.passes(counted)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [3, 2, 3, 2, 3, 3]
    said = [text.get_text().strip() for text in axes.texts]
    assert said == ["native_group_norm", "silu", "5.0", "3.0", "gelu", "mul", "5.0", "3.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["group_norm", "", "geglu", ""]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_each_kernel_has_a_dot_for_each_way_at_its_share_of_a_copys_speed():
    seconds = {"ours": 1.25, "compiled": 2.0, "eager": 4.0, "copy": 1.0}
    row = {"kernel": "geglu", "shape": [8192, 5120], "seconds": seconds}
    figure = kernelfigures.of_a_copy([("here", row), ("recorded: some-gpu", row)])
    (axes,) = figure.axes
    dots = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o")
    assert dots == [25, 25, 50, 50, 80, 80]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["geglu, 8192 x 5120 (here)", "geglu, 8192 x 5120 (recorded: some-gpu)"]
