import pytest
from made_up import row as made_up_row
from made_up import result

from sdopt import figures, frontfigures, levels, qualitytables, report, results, tables
from sdopt.errors import UserError

NOT_ONE = "no row is as fast and has more prompts all right than one of these"


def share(value, half=0.004, n=2560):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def row(i, seconds, lost=0.0, db=51.0, family="path", **more):
    """A row that lost so much of each fact, and drifted so far (None: another noise)."""
    quality = {"objects": share(0.99 - lost), "relations": share(0.93 - lost), "prompts_all_right": share(0.92 - lost)}
    quality |= {"psnr_db": db and share(db, 0.1), "ssim": db and share(1 - 1 / db**2, 1e-5)}
    change = {fact: share(-lost, 0.003) for fact in ("objects", "relations", "prompts_all_right")}
    quality |= {"frechet": share(3.0) | {"bias": 0.25}, "change": None if i == levels.REFERENCE else change}
    return made_up_row(i, seconds, quality=quality, family=family, unet_samples=60, **more)


def study(*rows):
    made = result(pictures=2560)
    base = [row("baseline_fp32", 0.5, db=None), row("noise_bf16", 0.4, family="noise", db=51.0), row("bf16", 0.42, db=50.6)]
    return made | {"study": "pocket-quality", "rows": [*base, *rows]}


def chosen(*rows):
    return {level: row["id"] for level, row in levels.recommended(study(*rows)).items()}


def test_lossless_is_no_more_drift_than_either_way_to_round_to_bf16():
    assert chosen(row("compile", 0.1, db=50.7))["lossless"] == "compile"
    assert chosen(row("int8", 0.1, db=50.4))["lossless"] == "bf16", "one yardstick reaches down to 50.5"
    assert chosen(row("compile", 0.1, db=51.5))["lossless"] == "compile", "less drift is no loss"
    assert chosen(row("euler_ancestral_4", 0.1, db=None))["lossless"] == "bf16", "of another noise nobody knows"


def test_lossless_keeps_adherence():
    assert chosen(row("compile", 0.1, lost=0.0029))["lossless"] == "compile"
    assert chosen(row("compile", 0.1, lost=0.0031))["lossless"] == "bf16", "clearly worse, paired"
    worse = row("compile", 0.1)
    worse["quality"]["relations"] = share(0.925)
    assert chosen(worse)["lossless"] == "bf16", "below the baseline's interval"


def test_the_other_levels_lose_no_more_than_they_say_at_the_worse_end():
    rows = [row("dpm_20", 0.1, 0.016, 33), row("dpm_8", 0.05, 0.018, 30), row("euler_4", 0.03, 0.09, 25), row("cutoff_0", 0.02, 0.2, 20)]
    assert chosen(*rows) == {"lossless": "bf16", "balanced": "dpm_20", "fastest": "euler_4"}


def test_of_rows_as_fast_as_each_other_the_better_is_taken_and_of_equals_the_first():
    assert chosen(row("quick", 0.099, 0.016, 33), row("good", 0.1, 0.001, 33))["balanced"] == "good"
    assert chosen(row("quick", 0.09, 0.016, 33), row("good", 0.1, 0.001, 33))["balanced"] == "quick", "times apart"
    steady = row("good", 0.1, 0.001, 33)
    steady["latency_s"] |= {"p20": 0.1, "p80": 0.1}
    assert chosen(row("quick", 0.097, 0.016, 33), steady)["balanced"] == "good", "3 % is no difference, however steady"
    assert chosen(row("first", 0.1), row("second", 0.099))["lossless"] == "first"
    unsteady = row("unsteady", 0.2, 0.001, 33)
    unsteady["latency_s"] |= {"p20": 0.05, "p80": 0.9}
    assert chosen(row("quick", 0.1, 0.016, 33), unsteady)["balanced"] == "quick", "its times overlap, and its median is no match"


def test_what_was_not_compared_with_the_baseline_qualifies_for_nothing():
    alone = row("euler_ancestral_4", 0.01, 0.3, db=None)
    alone["quality"]["change"] = None
    assert set(chosen(alone).values()) == {"bf16"}


def test_the_levels_say_when_the_baseline_does_not_repeat_itself():
    same, slower = (study(row("noise_seed", seconds, db=None, family="noise")) for seconds in (0.505, 0.75))
    assert qualitytables.again(study()) == qualitytables.again(same) == ""
    told = "counted from baseline_fp32, 0.500 s: noise_seed took 0.750 s"
    assert told in qualitytables.again(slower) and told in report.BLOCKS["levels"](slower)


def test_speedups_are_counted_from_the_faster_of_two_rows_that_do_the_baselines_work():
    made = study(row("noise_seed", 0.25, db=None, family="noise"), row("euler_4", 0.05, 0.05, 25))
    ids = lambda result: [row["id"] for row in levels.baselines(result)]
    assert ids(study()) == ["baseline_fp32"] and ids(made) == ["noise_seed", "baseline_fp32"]
    cells = {line[0]: line for line in qualitytables.lines(made)}
    gains = [cells[i][qualitytables.HEADER.index("baseline /")] for i in ("baseline_fp32", "noise_seed", "euler_4")]
    assert gains == ["0.50x", "", "5.00x"] and "5.00x" in report.BLOCKS["levels"](made)
    assert "noise_seed, 0.250 s: baseline_fp32 took 0.500 s" in tables.text(made)


def test_a_yardstick_is_never_recommended_and_a_row_that_failed_neither():
    failed = {"id": "compile", "label": "compile", "settings": {}, "status": "failed: out of memory", "quality": None}
    assert chosen(row("noise_seed", 0.01, family="noise"), failed)["fastest"] == "bf16"


def test_without_the_yardstick_nothing_is_recommended():
    made = study()
    made["rows"] = [made["rows"][0]]
    with pytest.raises(UserError, match="holds no noise_bf16 to compare with"):
        levels.recommended(made)


def test_the_front_is_what_no_row_beats():
    rows = [row("a", 0.1, 0.05), row("b", 0.2, 0.06), row("c", 0.3, 0.01), row("d", 0.3, 0.02), row("e", 0.1, 0.07)]
    assert [r["id"] for r in levels.pareto(study(*rows))] == ["a", "c", "bf16"]


def test_the_table_has_intervals_and_the_cost_in_samples():
    made = study(row("cfg_cutoff", 0.1, 0.02, 31, settings={"steps": 20, "cutoff": 0.4}))
    told = tables.text(made)
    assert "97.0 % (96.6 to 97.4)" in told and "31.0 dB (30.9 to 31.1)" in told and "5.00x" in told
    assert "of 2,560 pictures it comes out 0.25 too large" in told and f"{NOT_ONE}: cfg_cutoff, bf16" in told
    assert tables.table(made)[0] == list(qualitytables.HEADER)


def test_the_levels_are_a_block_with_their_price_and_their_rule():
    told = report.BLOCKS["levels"](study(row("dpm_8", 0.05, 0.016, 30)))
    assert "| balanced | dpm_8 | dpm_8 | 0.050 s | 10.00x | -1.6 points (-1.9 to -1.3) |" in told
    assert "| lossless | bf16 |" in told and "no more than 2% and 10% of the objects" in told


def test_a_study_without_its_baseline_still_has_a_table():
    made = study()
    made["rows"] = made["rows"][1:]
    assert "noise_bf16" in tables.text(made)


def test_the_front_is_drawn_from_the_file_alone_and_names_its_rows(tmp_path, monkeypatch):
    shown, save = [], figures.save
    keep = lambda figure, target, files: (shown.extend(t.get_text() for t in figure.axes[0].texts), save(figure, target, files))
    monkeypatch.setattr(figures, "save", keep)
    file = tmp_path / "pocket-quality.json"
    results.write(file, study(row("dpm_8", 0.05, 0.016, 30, family="schedulers")))
    frontfigures.front_figure(file, tmp_path / "front.png")
    assert figures.source(tmp_path / "front.png") == figures.digest([file])
    assert shown == ["1", "2", "1  dpm_8: balanced, fastest\n2  bf16: lossless"]


def test_every_family_has_a_colour():
    from sdopt.bench import sweeps

    assert {row.family for row in sweeps.rows("cuda", 30)} == set(frontfigures.FAMILIES)
