import re

import numpy as np
import pytest
from made_up_grids import attribution_result, batches_result, hpml_result
from PIL import Image

from sdopt import figures, gridfigures, gridtables, quantization, report, results, tables
from sdopt.errors import UserError


@pytest.fixture(autouse=True)
def no_int8(monkeypatch):
    """As on an H200, where int8 rounds nothing."""
    monkeypatch.setattr(quantization, "gains_nowhere", lambda device: device == "cuda")


def cells(told):
    """{first cell of a line: {column: cell}} of a study's table."""
    header, *lines = tables.table(told)
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_each_batch_has_its_seconds_pictures_and_memory_and_what_was_published():
    lines = cells(batches_result())
    assert list(lines) == ["1", "2", "4", "8", "16", "24"]
    four = lines["4"]
    assert (four["eager, s"], four["compiled, s"], four["engine, s"]) == ("2.38", "1.06", "0.980")
    assert (four["eager, images/s"], four["engine, images/s"], four["eager, GiB"]) == ("1.68", "4.08", "16.0")
    assert (four["published, s"], four["published, GB"], lines["16"]["published, s"]) == ("19", "18.5", "")
    assert "published, s" not in cells(batches_result("sdxl-batches"))["4"], "x-stable-diffusion drew Stable Diffusion 1"


def test_a_batch_that_does_not_fit_is_told_in_its_place_and_in_full():
    told = batches_result()
    last = cells(told)["24"]
    assert (last["eager, s"], last["eager, images/s"], last["eager, GiB"]) == ("out of memory", "", "")
    assert last["engine, s"] == "5.38"
    assert "eager_24 failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 24.00 GiB" in tables.text(told)
    told["rows"] = [row for row in told["rows"] if row["status"] != "ok"]
    assert tables.table(told) == [["batch", "eager, s"], ["24", "out of memory"]]


def test_remarks_of_batches_say_how_they_were_measured():
    told = batches_result()
    told["rows"][6] |= {"graphs": {"compiled": 0, "found": 2}}
    said = "\n".join(tables.remarks(told))
    assert "3 to 9 timed calls a row" in said and re.search(r"at most \d\.\d% of the median \(\w+_\d+\)", said)
    assert "first call of a batch, compiled: 1.02 s at 1, " in said and "found on disk: compiled_1" in said
    assert "stock PyTorch in fp16 on an A100 40 GB" in said
    assert "batch 1 to 24, Some GPU" in tables.text(told)


def test_the_hpml_rows_stand_beside_the_published_as_ratios_to_the_own_baseline():
    lines = cells(hpml_result())
    assert list(lines) == [
        *("baseline", "compiled", "compiled_tiny", "euler_30", "euler_20", "dpm_20_steps"),
        *("dpm_20_cutoff", "euler_20_cutoff", "final"),
    ]
    final = lines["final"]
    assert (final["baseline /"], final["published"], final["published, baseline /"]) == ("4.50x", "0.297 s", "4.38x")
    assert (final["memory / baseline"], final["published, memory / baseline"]) == ("0.87", "1.48")
    assert lines["baseline"]["baseline /"] == "" and lines["baseline"]["published"] == "1.3 s"
    said = "\n".join(tables.remarks(hpml_result()))
    assert "0.998x is what two measurements of one pipeline differ by" in said and "on an A100 (Colab)" in said


def test_without_a_baseline_the_published_ratios_stay():
    told = hpml_result()
    told["rows"][0] = {"id": "baseline", "label": "fp16", "settings": {}, "status": "failed: out of memory"}
    lines = cells(told)
    assert lines["baseline"]["median"] == "failed: out of memory"
    assert "baseline /" not in lines["final"] and lines["final"]["published, baseline /"] == "4.38x"


def test_every_published_figure_belongs_to_a_row_that_there_is():
    for made in (batches_result(), hpml_result()):
        other, ids = gridtables.published(made["study"]), {row["id"] for row in made["rows"]}
        assert other["s"] and set(other["s"]) == set(other["GB"]) <= ids
    assert set(other["s"]) == ids, "all rows of the project have a figure"
    assert gridtables.published("sdxl-attribution") == {"s": {}, "GB": {}, "by": None}


def test_a_step_is_paid_in_its_place_and_in_the_whole():
    lines = cells(attribution_result())
    assert (lines["sdpa"]["its gain there"], lines["sdpa"]["its gain in the whole"]) == ("1.14x", "1.25x")
    assert (lines["compile"]["up to it"], lines["compile"]["its gain there"]) == ("1.80 s", "2.20x")
    assert lines["fused_qkv"]["its gain there"] == "1.01x (within the spread)"
    assert (lines["cfg_cutoff"]["the whole without it"], lines["cfg_cutoff"]["its gain in the whole"]) == ("1.13 s", "1.25x")
    assert lines["baseline_fp32"]["the whole without it"] == ""
    assert lines["int8"]["its gain there"] == lines["int8"]["its gain in the whole"] == "the same"
    told = gridtables.attributed(attribution_result())
    there = np.prod([step["gain"]["speedup"] for step in told if step["gain"]])
    assert there == pytest.approx(9.0 / told[-1]["upto"]["latency_s"]["median"]), "in their places gains multiply to the whole's"
    said = "\n".join(tables.remarks(attribution_result()))
    assert f"multiply to {there:.1f}x, those in the whole to 10.9x" in said
    assert "int8: rounds no layer on this GPU" in said and "sdpa: fused projections attend by SDPA anyway" in said


def test_where_int8_rounds_it_has_gains_of_its_own():
    lines = cells(attribution_result("cpu"))
    assert lines["int8"]["its gain there"].startswith("1.00x") and lines["int8"]["its gain in the whole"].startswith("1.00x")


def test_a_row_that_failed_leaves_the_gains_that_need_it_untold():
    told = attribution_result()
    sdpa = told["rows"][2]
    told["rows"][2] = {key: sdpa[key] for key in ("id", "label", "settings", "upto", "without")} | {"status": "failed: out of memory"}
    lines = cells(told)
    assert lines["sdpa"]["its gain there"] == lines["compile"]["its gain there"] == ""
    assert lines["sdpa"]["its gain in the whole"] == "1.25x" and "sdpa failed: out of memory" in tables.remarks(told)


def test_what_was_compiled_ahead_is_told_cold_and_warm():
    made = batches_result()
    for row in made["rows"]:
        if row["way"] == "compiled":
            row["graphs"] = {"compiled": 0, "found": 2}
            calls = {"cold_s": 100.0, "compiled": 2, "found": 0, "warm_s": 20.0 + row["settings"].get("batch", 1)}
            row |= {"first_calls": calls, "first_call_s": 100.0}
    (said,) = (line for line in tables.remarks(made) if line.startswith("first call of a batch, compiled"))
    assert "100 s at 1, " in said and said.endswith("100 s at 24, compiled side by side; with all of it on disk 21.00 s to 44.00 s")
    del made["rows"][6]["first_calls"]
    (said,) = (line for line in tables.remarks(made) if line.startswith("first call of a batch, compiled"))
    assert said.endswith("; compiled before, and found on disk: compiled_1")


def drawn(tmp_path, made, monkeypatch):
    """The PNG of a study, and the words in it."""
    shown, save = [], figures.save

    def keep(figure, target, files):
        shown.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        save(figure, target, files)

    monkeypatch.setattr(figures, "save", keep)
    results.write(file := tmp_path / f"{made['study']}.json", made)
    gridfigures.FIGURES[gridtables.kind(made)](file, target := tmp_path / "figure.png")
    assert figures.source(target) == figures.digest(gridfigures.sources(file))
    return target, shown


@pytest.mark.parametrize("make", [batches_result, hpml_result, attribution_result])
def test_a_figure_is_a_readable_png(tmp_path, make, monkeypatch):
    target, _ = drawn(tmp_path, make(), monkeypatch)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300 and (pixels < 200).mean() > 0.01, "something is drawn"
    made = make()
    for rows in ([], made["rows"][-1:], [r for r in made["rows"] if r["status"] != "ok"]):
        assert drawn(tmp_path, made | {"rows": rows}, monkeypatch)[0].exists(), "however little worked"


def test_every_timed_run_is_a_point(tmp_path, monkeypatch):
    points, made = [], batches_result()
    monkeypatch.setattr(figures, "save", lambda figure, *_: points.extend(line.get_ydata() for line in figure.axes[1].lines))
    results.write(tmp_path / "sd15-batches.json", made)
    gridfigures.batches_figure(tmp_path / "sd15-batches.json", tmp_path / "figure.png")
    seen = {round(float(y), 9) for ys in points for y in ys}
    runs = [run for row in made["rows"] if row["status"] == "ok" for run in row["latency_s"]["runs"]]
    assert len(runs) > 100 and {round(run, 9) for run in runs} <= seen


def test_figures_say_the_numbers(tmp_path, monkeypatch):
    assert "x  eager: out of memory" in drawn(tmp_path, batches_result(), monkeypatch)[1]
    assert {"4.50x   0.200 s", "4.38x   0.297 s", "1.48x   4.13 GB"} <= set(drawn(tmp_path, hpml_result(), monkeypatch)[1])
    assert {"1.14x", "1.25x", "changes nothing here"} <= set(drawn(tmp_path, attribution_result(), monkeypatch)[1])


PAGE = "Before.\n\n<!-- sdopt study some-gpu/sd15-batches -->\n<!-- /sdopt -->\n\nAfter.\n"


def test_a_page_shows_a_study_once_it_is_recorded_and_nothing_before(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "figures" / "data").mkdir(parents=True)
    (root / "README.md").write_text(PAGE)
    assert report.renew(root) == [] and (root / "README.md").read_text() == PAGE
    results.write(tmp_path / "out" / "sd15-batches.json", batches_result())
    assert report.add(tmp_path / "out", root) == "sd15-batches.json"
    assert [path.name for path in report.renew(root)] == ["some-gpu-sd15-batches.png", "README.md"]
    page = (root / "README.md").read_text()
    assert "#### Stable Diffusion 1.5: how many pictures at once" in page and "| 4 | 2.38 | 1.06 | 0.980 |" in page
    assert "(figures/some-gpu-sd15-batches.png)" in page and page.endswith("<!-- /sdopt -->\n\nAfter.\n")
    assert report.stale(root) == []
    (root / "README.md").write_text(PAGE.replace("batches", "path"))
    with pytest.raises(UserError, match="asks for all of sd15-path, which is none of these"):
        report.stale(root)
