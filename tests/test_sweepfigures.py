import pytest
from made_up import result
from made_up import row as made_up_row
from test_levels import share

from sdopt import figures, report, results, sweepfigures
from sdopt.bench import sweeps

ROWS = {row.id: row for row in sweeps.rows("cuda", 30)}


def row(i, right, frechet=3.0):
    """A row of the study by its id, with made-up quality."""
    swept, shared = ROWS[i], {"scheduler": "euler", "steps": 30, "runs": 9, "batch": 1}
    distance = frechet and share(frechet, 0.1) | {"bias": 0.2}
    quality = {"prompts_all_right": share(right), "frechet": distance}
    how = swept.differs(shared)
    return made_up_row(i, 0.1, quality=quality, family=swept.family, settings=how, unet_samples=swept.samples(30))


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What a figure shows of a study with the rows that are given: {series: [(cost, percent)]} of the left panel, and its labels."""

    def draw(make, *rows):
        kept, save = [], figures.save
        monkeypatch.setattr(figures, "save", lambda figure, target, files: (kept.append(figure), save(figure, target, files)))
        file = tmp_path / "pocket-quality.json"
        results.write(file, result(pictures=2560) | {"study": "pocket-quality", "rows": list(rows)})
        make(file, tmp_path / "drawn.png")
        assert figures.source(tmp_path / "drawn.png") == figures.digest([file])
        axes = kept[-1].axes[0]
        names = [text.get_text() for text in kept[-1].legends[0].get_texts()]
        lines = [container.lines[0] for container in axes.containers]
        points = [[(x, round(y, 6)) for x, y in zip(*line.get_data(), strict=True)] for line in lines]
        return dict(zip(names, points, strict=False)), [text.get_text() for text in axes.texts], names

    return draw


def test_schedulers_are_drawn_by_their_steps(drawn):
    rows = row("euler_30_steps", 0.93), row("euler_4_steps", 0.8), row("dpm_8_steps", 0.9), row("cutoff_0.4", 0.5)
    series, _, names = drawn(sweepfigures.schedulers_figure, row("baseline_fp32", 0.92), *rows)
    assert series == {"euler": [(4, 80), (30, 93)], "dpm": [(8, 90)]} and names[-1] == "the baseline and its interval"


@pytest.mark.parametrize(("largest", "scale"), [(35.0, "log"), (9.0, "linear")])
def test_distances_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path, monkeypatch, largest, scale):
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, target, files: (kept.append(figure), save(figure, target, files)))
    file = tmp_path / "pocket-quality.json"
    rows = [row("euler_4_steps", 0.8, 1.8), row("dpm_4_steps", 0.6, largest)]
    results.write(file, result(pictures=2560) | {"study": "pocket-quality", "rows": rows})
    sweepfigures.schedulers_figure(file, tmp_path / "drawn.png")
    left, right = kept[-1].axes
    assert left.get_yscale() == "linear" and right.get_yscale() == scale
    assert ("(logarithmic)" in right.get_ylabel()) == (scale == "log")


def test_guidance_is_drawn_by_what_it_costs_and_named_by_where_it_ends(drawn):
    rows = row("cutoff_1", 0.93), row("cutoff_0", 0.7), row("cutoff_0.4", 0.9), row("guided_0.2_0.6", 0.91, None)
    series, labels, names = drawn(sweepfigures.guidance_figure, *rows)
    assert series == {
        "from the first step on": [(30, 70), (42, 90), (60, 93)],
        "from 20% of the steps on, and the first": [(43, 91)],
    }
    assert labels == ["0%", "40%", "100%", "60%"] and len(names) == 2, "no baseline was measured"


def test_a_report_draws_the_sweeps_that_were_measured(tmp_path):
    file = tmp_path / "pocket-quality.json"
    for rows, suffixes in (
        ([row("baseline_fp32", 0.9)], [""]),
        ([row("baseline_fp32", 0.9), row("cutoff_1", 0.9)], ["", "-guidance"]),
        ([row("euler_4_steps", 0.9), row("cutoff_1", 0.9)], ["", "-schedulers", "-guidance"]),
    ):
        results.write(file, result(pictures=2560) | {"study": "pocket-quality", "rows": rows})
        assert list(report._drawings(file)[1]) == suffixes


def test_a_page_shows_a_sweep_where_it_was_measured(tmp_path):
    folder = tmp_path / "figures" / "data" / "some-gpu"
    page = tmp_path / "README.md"
    page.write_text("".join(f"<!-- sdopt {kind} some-gpu/pocket-quality -->\n<!-- /sdopt -->\n" for kind in report.SWEPT))
    folder.mkdir(parents=True)
    assert report.stale(tmp_path) == [], "nothing is measured yet"
    results.write(folder / "pocket-quality.json", result(pictures=2560) | {"study": "pocket-quality", "rows": [row("cutoff_1", 0.9)]})
    written = [path.name for path in report.renew(tmp_path)]
    assert written == ["some-gpu-pocket-quality.png", "some-gpu-pocket-quality-guidance.png", "README.md"]
    assert "](figures/some-gpu-pocket-quality-guidance.png)" in page.read_text() and "-schedulers.png" not in page.read_text()
