import json
import re
from types import SimpleNamespace

import pytest
from made_up import IDS, bench_result, peers_result, result, run_folder, stages_result

from sdopt import report, results
from sdopt.bench import studies
from sdopt.errors import UserError

README = """# A title

<!-- sdopt headline cpu-2-cores/pocket-path -->
<!-- /sdopt -->

Prose stays.

<!-- sdopt table cpu-2-cores/pocket-path -->
old
<!-- /sdopt -->

<!-- sdopt table some-gpu/sdxl-peers -->
<!-- /sdopt -->
"""
NOTEBOOK = "notebooks/10_the_whole_path.ipynb"
PATH, PEERS = "figures/data/cpu-2-cores/pocket-path.json", "figures/data/some-gpu/sdxl-peers.json"
FIGURES = [
    *(f"cpu-2-cores-pocket-path{suffix}.png" for suffix in ("", "-stages", "-before-after")),
    *(f"some-gpu-sdxl-path{suffix}.png" for suffix in ("", "-stages", "-kernels")),
    *(f"some-gpu-sdxl-peers{suffix}.png" for suffix in ("", "-attention", "-kernels")),
]


@pytest.fixture
def data(tmp_path):
    """A checkout with a page and recorded measurements, and nothing made from them."""
    root = tmp_path / "checkout"
    (root / "figures" / "data").mkdir(parents=True)
    (root / "README.md").write_text(README)
    run_folder(tmp_path / "out", peers_result())
    run_folder(tmp_path / "out", bench_result())
    assert report.add(run_folder(tmp_path / "out"), root) == "pocket-path.json, sdxl-path.json, sdxl-peers.json"
    return root


@pytest.fixture
def checkout(data, monkeypatch):
    """The same with all figures, which are not worth drawing anew for every test: digests alone."""

    def draw(*sources_and_target):
        target = sources_and_target[-1]
        target.write_text(report.figures.digest(report._drawings(recorded_in(target, data))[0]))

    for module, names in (
        (report.pathfigures, ("path_figure", "before_and_after")),
        (report.timefigures, ("stages_figure", "kernels_figure")),
        (report.peerfigures, ("peers_figure", "attention_figure")),
        (report.rooflinefigures, ("roofline_figure",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, draw)
    monkeypatch.setattr(report.figures, "source", lambda path: path.read_text() if path.exists() else None)
    (data / "figures" / "data" / "published.json").write_text('{"rows": []}')
    report.renew(data)
    return data


def recorded_in(target, root):
    machine, study = re.match(r"(cpu-2-cores|some-gpu)-(\w+-(?:path|peers|stages))", target.name).groups()
    return root / "figures" / "data" / machine / f"{study}.json"


def write_notebook(root, *sources):
    """A notebook with a code cell and a markdown cell for each of `sources`, as nbformat writes it."""
    cells = [{"cell_type": "code", "source": ["1\n", "<!-- sdopt"], "outputs": [{"text": ["—\n"]}], "metadata": {}}]
    cells += [{"cell_type": "markdown", "source": text.splitlines(keepends=True), "metadata": {}} for text in sources]
    path = root / NOTEBOOK
    path.parent.mkdir(exist_ok=True)
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return path


def test_a_page_keeps_the_ends_of_its_lines(checkout):
    page = checkout / "README.md"
    made = page.read_bytes()
    page.write_bytes(made.replace(b"\n", b"\r\n"))
    assert report.renew(checkout) == []
    page.write_bytes(README.replace("\n", "\r\n").encode())
    assert report.renew(checkout) == [page] and page.read_bytes() == made.replace(b"\n", b"\r\n")


def test_renewing_once_leaves_nothing_stale(data):
    written = [path.name for path in report.renew(data)]
    assert written == [*FIGURES, "README.md"]
    assert report.stale(data) == []
    assert report.renew(data) == []


def test_the_readme_gets_its_numbers_and_keeps_its_prose(checkout):
    text = (checkout / "README.md").read_text()
    assert "in 4.00 s and at the end of the path in 0.800 s: 5.0 times faster on Some CPU, 2 cores." in text
    assert "Prose stays." in text
    assert "\nold\n" not in text
    assert sum(line.startswith(f"| {i} |") for i in IDS for line in text.splitlines()) == len(IDS)


@pytest.mark.parametrize("spoiled", ["README.md", *(f"figures/{name}" for name in FIGURES)])
def test_what_no_longer_matches_is_stale(checkout, spoiled):
    path = checkout / spoiled
    if path.suffix == ".md":
        path.write_text(path.read_text().replace("4.00 s", "3.00 s"))
    else:
        path.unlink()
    assert report.stale(checkout) == [path]


@pytest.mark.parametrize(
    ("source", "edit", "stale"),
    [
        (PATH, ('"median": 4.0', '"median": 3.9'), [*FIGURES[:3], "README.md"]),
        (PATH, ('"vae": 360.0', '"vae": 361.0'), FIGURES[:3]),
        (PEERS, ('"median": 1.7,', '"median": 1.6,'), [*FIGURES[6:], "README.md"]),
    ],
)
def test_one_number_of_a_measurement_edited_makes_what_shows_it_stale(checkout, source, edit, stale):
    path = checkout / source
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    assert [path.name for path in report.stale(checkout)] == stale


def test_another_way_of_drawing_makes_every_figure_stale(checkout, monkeypatch):
    monkeypatch.setattr(report.figures, "DRAWN", 0)
    assert [path.name for path in report.stale(checkout)] == FIGURES


def test_a_notebook_gets_its_blocks_in_the_cell_and_keeps_the_rest(checkout):
    block = "<!-- sdopt headline cpu-2-cores/pocket-path -->\n<!-- /sdopt -->"
    path = write_notebook(checkout, "No block — no change.", f"Before.\n\n{block}\n\nAfter.")
    old = json.loads(path.read_text())
    assert report.renew(checkout) == [path]
    new = path.read_text()
    assert new == json.dumps(json.loads(new), indent=1, ensure_ascii=False) + "\n"
    cells = json.loads(new)["cells"]
    assert cells[:2] == old["cells"][:2]
    assert cells[2]["source"][:3] == ["Before.\n", "\n", "<!-- sdopt headline cpu-2-cores/pocket-path -->\n"]
    assert cells[2]["source"][3].startswith("The same prompt and the same noise, by the baseline in 4.00 s")
    assert cells[2]["source"][-2:] == ["\n", "After."]
    path.write_text(new.replace("4.00 s", "3.00 s"))
    assert report.stale(checkout) == [path]


def test_a_notebook_without_blocks_is_left_as_it_is(checkout):
    path = write_notebook(checkout, "Only words.")
    path.write_text(path.read_text().replace("\n ", "\n    "))
    assert report.stale(checkout) == []


def test_published_figures_are_a_block(checkout):
    rows = [{"what": "a", "hardware": "b", "source": "c", "figures": [{"name": "fp32", "value": 7.36, "unit": "s"}]}]
    results.write_json(checkout / "figures" / "data" / "published.json", {"rows": rows})
    write_notebook(checkout, "<!-- sdopt published published -->\n<!-- /sdopt -->")
    report.renew(checkout)
    assert "| a | b | fp32 7.36 s | c |" in (checkout / NOTEBOOK).read_text()


def test_noise_gets_no_before_and_after_and_loses_the_pictures_of_older_measurements(tmp_path, checkout):
    pictures = checkout / "figures" / "data" / "cpu-2-cores" / "pocket-path"
    assert list(pictures.iterdir())
    report.add(run_folder(tmp_path / "noise", weights="random"), checkout)
    assert "cpu-2-cores-pocket-path-before-after.png" not in [path.name for path in report.stale(checkout)]
    assert not list(pictures.iterdir())


def test_without_pictures_there_is_no_before_and_after(checkout):
    for picture in (checkout / "figures" / "data" / "cpu-2-cores" / "pocket-path").iterdir():
        picture.unlink()
    assert "cpu-2-cores-pocket-path-before-after.png" not in [path.name for path in report.stale(checkout)]


def test_without_a_baseline_there_is_no_before_and_after(tmp_path, checkout):
    part = result()
    part["rows"] = part["rows"][1:3]
    results.write(checkout / "figures" / "data" / "cpu-2-cores" / "pocket-path.json", part)
    (checkout / "README.md").unlink()
    assert [path.name for path in report.stale(checkout)] == FIGURES[:2]


def _failed(made):
    made["rows"] = [row | {"status": "failed: out of memory"} for row in made["rows"]]


def _without_its_baseline(made):
    made["rows"] = made["rows"][1:]


def _with_few_rows(made):
    made["rows"] = made["rows"][:2]


@pytest.mark.parametrize(("less", "said"), [
    (_failed, "has no row that was measured"),
    (_without_its_baseline, "holds no baseline to compare with"),
    (_with_few_rows, r"has rows that .* lacks \(sdpa, compile"),
])  # fmt: skip
def test_what_says_less_than_what_is_recorded_replaces_nothing(tmp_path, checkout, less, said):
    """Nor does what lies beside it."""
    made, data = result(), checkout / "figures" / "data"
    less(made)
    out = run_folder(tmp_path / "less", made)
    run_folder(out, peers_result())
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    with pytest.raises(UserError, match=said):
        report.add(out, checkout)
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before


def test_what_was_measured_for_the_notebooks_is_added_whole_or_not_at_all(tmp_path, checkout):
    data = checkout / "figures" / "data"
    gpu = {"environment": result()["environment"] | {"gpu": "NVIDIA H200"}}
    kernels, tradeoff = tmp_path / "kernels.json", tmp_path / "pocket-tradeoff.json"
    results.write_json(kernels, gpu | {"metrics": {"products": [1, 2], "fusions": [3]}})
    results.write_json(tradeoff, gpu | {"rows": [{"id": "dpm_10", "quality": {}}]})
    assert report.add(tmp_path, checkout) == "kernels.json, pocket-tradeoff.json"
    for path in (kernels, tradeoff):
        assert (data / "nvidia-h200" / path.name).read_bytes() == path.read_bytes()
    results.write_json(tradeoff, gpu | {"rows": [{"id": "dpm_10", "quality": {}}, {"id": "dpm_20", "quality": {}}]})
    for less in ({"products": [1, 2]}, {"products": [1], "fusions": [3]}):  # as runs that were stopped leave them
        results.write_json(kernels, gpu | {"metrics": less})
        with pytest.raises(UserError, match=r"has parts that .*kernels.json lacks \((fusions|products)\)"):
            report.add(tmp_path, checkout)
    assert len(results.read_json(data / "nvidia-h200" / tradeoff.name)["rows"]) == 1, "nor what came with it"
    kernels.unlink()
    for rows in ([], [{"id": "dpm_10", "quality": None}, {"id": "dpm_20", "quality": {}}]):
        results.write_json(tradeoff, gpu | {"rows": rows})
        with pytest.raises(UserError, match="is not what `python|has parts that .* lacks .dpm_10."):
            report.add(tmp_path, checkout)


@pytest.mark.parametrize("wrong", [
    *([], 3, {}, {"metrics": {"a": [1]}}, {"environment": None, "metrics": {"a": [1]}}, {"environment": ["gpu"], "metrics": {"a": [1]}}),
    *({"environment": {"gpu": "x"}, "rows": 3}, {"environment": {"gpu": "x"}, "rows": [{"x": 1}]}),
    *({"environment": {"gpu": "x"}, "metrics": found} for found in ({}, 3, {"a": 3})),
], ids=str)  # fmt: skip
def test_what_was_not_measured_for_the_notebooks_is_not_added_as_that(tmp_path, checkout, wrong):
    results.write_json(tmp_path / "kernels.json", wrong)
    with pytest.raises(UserError, match="is not what `python -m sdopt.bench.lessons` writes"):
        report.add(tmp_path, checkout)


def test_adding_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no result of a run"):
        report.add(tmp_path, tmp_path)


def test_what_is_not_measured_yet_leaves_its_place_empty(checkout):
    empty = "".join(f"<!-- sdopt {kind} some-gpu/sdxl-stages -->\n<!-- /sdopt -->\n" for kind in ("figure", "table", "rates"))
    page = checkout / "README.md"
    page.write_text(empty)
    assert report.stale(checkout) == []
    page.write_text(empty.replace("stages -->\n", "stages -->\nold\n"))
    report.renew(checkout)
    assert page.read_text() == empty


def test_a_figure_is_shown_where_a_page_asks_for_it(tmp_path, checkout):
    block = "<!-- sdopt figure some-gpu/sdxl-stages -->\n<!-- /sdopt -->"
    (checkout / "README.md").write_text(block)
    path = write_notebook(checkout, block)
    report.add(run_folder(tmp_path / "stages", stages_result()), checkout)
    assert {"some-gpu-sdxl-stages.png", "README.md", path.name} == {path.name for path in report.renew(checkout)}
    assert "batch 1, Some GPU](figures/some-gpu-sdxl-stages.png)\n<!-- /" in (checkout / "README.md").read_text()
    assert "batch 1, Some GPU](../figures/some-gpu-sdxl-stages.png)\\n" in path.read_text()
    assert report.stale(checkout) == []


def test_every_block_is_of_something_recorded_or_of_a_study_that_can_be():
    asked = [found for page in report.PAGES for found in report.BLOCK.findall((report.ROOT / page).read_text().replace("\\n", "\n"))]
    assert len(asked) > 10
    for kind, study, _ in asked:
        recorded = (report.ROOT / "figures" / "data" / f"{study}.json").exists()
        assert recorded or study.partition("/")[2] in studies.STUDIES, f"{kind} {study}"


def test_an_unknown_block_is_refused(checkout):
    (checkout / "README.md").write_text(README.replace("headline", "poem"))
    with pytest.raises(UserError, match="unknown block 'poem'"):
        report.stale(checkout)


def test_a_block_that_is_not_closed_is_refused_and_swallows_nothing(checkout):
    (checkout / "README.md").write_text(README.replace("<!-- /sdopt -->\n\nProse", "\nProse"))
    with pytest.raises(UserError, match="is not closed"):
        report.renew(checkout)
    assert "Prose stays." in (checkout / "README.md").read_text()


def test_outside_a_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match="works in a checkout"):
        report.stale(tmp_path)


def test_what_is_recorded_is_found_by_machine_and_study(checkout):
    assert report.recorded("cpu-2-cores", "pocket-path", checkout) == result()
    assert report.recorded("cpu-2-cores", "sdxl-path", checkout) is None


STUDY = SimpleNamespace(name="sdxl-path", kind="path")
ROWS = [SimpleNamespace(id="bf16", label="half precision"), SimpleNamespace(id="sdpa", label="attention")]


def test_a_plan_has_a_line_a_row_and_the_sum():
    lines = report.plan(STUDY, ROWS, {"bf16": 65.4, "sdpa": 30.0}, "some-gpu").splitlines()
    assert lines[2:4] == ["bf16  half precision  1 min 05 s", "sdpa  attention             30 s"]
    assert lines[-1] == "2 rows: about 1 min 35 s"


def test_a_plan_says_what_it_does_not_know():
    plan = report.plan(STUDY, ROWS, {"sdpa": 30.0}, "some-gpu")
    assert "half precision  no estimate" in plan
    assert plan.endswith("about 30 s, and 1 more without an estimate")
    assert "nothing of sdxl-path is recorded on some-gpu" in report.plan(STUDY, ROWS, {}, "some-gpu")


def test_a_plan_knows_what_is_done():
    estimates = {"bf16": 65.4, "sdpa": 30.0}
    lines = report.plan(STUDY, ROWS, estimates, "some-gpu", ["bf16"]).splitlines()
    assert lines[2:4] == ["bf16  half precision  done", "sdpa  attention       30 s"]
    assert lines[-1] == "1 row left of 2: about 30 s"
    assert "all 2 rows are done" in report.plan(STUDY, ROWS, estimates, "some-gpu", ["bf16", "sdpa"])


def test_an_engine_study_is_drawn_as_its_peers_are(tmp_path):
    told = peers_result()
    told["study"] = "sdxl-engine"
    told["rows"][0] |= {"id": "engine_bf16"}
    file = run_folder(tmp_path, told) / "sdxl-engine.json"
    _, drawings = report._drawings(file)
    assert "" in drawings and "-attention" not in drawings
    drawings[""](tmp_path / "engine.png")
    assert (tmp_path / "engine.png").stat().st_size > 5000
