import pytest
from made_up import IDS, result, run_folder

from sdopt import report
from sdopt.errors import UserError

README = """# A title

<!-- sdopt headline cpu-2-cores/pocket-path -->
<!-- /sdopt -->

Prose stays.

<!-- sdopt table cpu-2-cores/pocket-path -->
old
<!-- /sdopt -->
"""


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "figures" / "data").mkdir(parents=True)
    (root / "README.md").write_text(README)
    report.add(run_folder(tmp_path / "out"), root)
    return root


def test_renewing_once_leaves_nothing_stale(checkout):
    written = [path.name for path in report.renew(checkout)]
    assert written == ["cpu-2-cores-pocket-path.png", "cpu-2-cores-pocket-path-before-after.png", "README.md"]
    assert report.stale(checkout) == []
    assert report.renew(checkout) == []


def test_the_readme_gets_its_numbers_and_keeps_its_prose(checkout):
    report.renew(checkout)
    text = (checkout / "README.md").read_text()
    assert "in 4.00 s and at the end of the path in 0.800 s: 5.0 times faster on Some CPU, 2 cores." in text
    assert "Prose stays." in text
    assert "\nold\n" not in text
    assert sum(line.startswith(f"| {i} |") for i in IDS for line in text.splitlines()) == len(IDS)


@pytest.mark.parametrize("spoiled", ["README.md", "figures/cpu-2-cores-pocket-path.png"])
def test_what_no_longer_matches_is_stale(checkout, spoiled):
    report.renew(checkout)
    path = checkout / spoiled
    if path.suffix == ".md":
        path.write_text(path.read_text().replace("4.00 s", "3.00 s"))
    else:
        path.unlink()
    assert report.stale(checkout) == [path]


def test_a_new_measurement_makes_everything_stale(checkout):
    report.renew(checkout)
    path = checkout / "figures" / "data" / "cpu-2-cores" / "pocket-path.json"
    path.write_text(path.read_text().replace('"median": 4.0', '"median": 3.9'))
    assert len(report.stale(checkout)) == 3


def test_noise_gets_no_before_and_after(tmp_path, checkout):
    report.add(run_folder(tmp_path / "noise", weights="random"), checkout)
    assert "cpu-2-cores-pocket-path-before-after.png" not in [path.name for path in report.stale(checkout)]


def test_adding_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no result of a run"):
        report.add(tmp_path, tmp_path)


def test_an_unknown_block_is_refused(checkout):
    (checkout / "README.md").write_text(README.replace("headline", "poem"))
    with pytest.raises(UserError, match="unknown block 'poem'"):
        report.stale(checkout)


def test_outside_a_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match="works in a checkout"):
        report.stale(tmp_path)


def test_the_table_says_what_each_row_gained():
    lines = {line[0]: line for line in report.table(result())}
    gains = {i: lines[i][5:7] for i in IDS}
    assert gains["baseline_fp32"] == ["", ""]
    assert gains["bf16"] == ["2.00x", "2.00x"]
    assert gains["cfg_cutoff"] == ["5.00x", "1.25x"]
    assert lines["bf16"][7:] == ["8/10", "3/5", "31.5 dB", "31.5 dB"]


def test_a_failed_row_is_told_and_not_compared_with():
    failed = result()
    failed["rows"][1] = {"id": "bf16", "label": "bf16", "settings": {}, "status": "failed: out of memory"}
    lines = {line[0]: line for line in report.table(failed)}
    assert lines["bf16"][1] == "failed: out of memory"
    assert lines["sdpa"][5:7] == ["2.04x", ""]
    assert "bf16" in report.text(failed)


def test_without_a_baseline_nothing_is_compared_with_it_and_noise_has_no_quality():
    part = result(weights="random")
    part["rows"] = [row | {"quality": None} for row in part["rows"][1:3]]
    header, *lines = report.table(part)
    assert header[-2:] == ["peak memory", "before /"]
    assert [line[-1] for line in lines] == ["", "1.02x"]


def test_remarks_name_the_kind_of_compilation_the_layout_and_what_did_not_help():
    told = result()
    told["rows"][3] |= {"apart": {"channels_last": {"latency_s": {"median": 1.9}}}}
    told["rows"][5]["note"] = "slower than the step before (0.67x): because"
    assert report.remarks(told) == [
        "compile and after: regional compilation, the UNet's attention blocks alone",
        "compile: the channels_last layout alone, uncompiled, takes 1.90 s",
        "int8: slower than the step before (0.67x): because",
    ]
