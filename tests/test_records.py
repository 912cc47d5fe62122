import json
import lzma
from types import SimpleNamespace

import pytest

from sdopt import intervals, records
from sdopt.errors import UserError

AGREEMENTS = [
    SimpleNamespace(objects=(True, True), relations=(True,)),
    SimpleNamespace(objects=(True, False), relations=(False,)),
    SimpleNamespace(objects=(True,), relations=()),
]
DRIFT = {
    "psnr_db": [31.23456, 40.0, 100.0],
    "ssim": [0.9123456, 1.0, 0.5],
    "p99": [12, 3, 0],
    "latent_cosine": [0.98765432, 1.0, 0.9],
}


def test_a_record_has_a_number_a_picture_and_is_read_as_it_was_written(tmp_path):
    record = records.of(AGREEMENTS, DRIFT)
    assert record["objects_right"] == [2, 1, 1] and record["objects_of"] == [2, 2, 1]
    assert record["relations_right"] == [1, 0, 0] and record["relations_of"] == [1, 1, 0]
    assert (record["psnr_db"][0], record["ssim"][0], record["latent_cosine"][0]) == (31.23, 0.91235, 0.987654)
    records.write(tmp_path / "row.json.xz", record)
    assert records.read(tmp_path / "row.json.xz") == record == json.loads(lzma.decompress((tmp_path / "row.json.xz").read_bytes()))


def test_thousands_of_pictures_are_kept_in_some_twenty_kilobytes(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    drift = {"psnr_db": rng.normal(50, 2, 2560), "ssim": 1 - rng.random(2560) / 50}
    drift |= {"p99": rng.integers(0, 40, 2560), "latent_cosine": 1 - rng.random(2560) / 100}
    records.write(tmp_path / "row.json.xz", records.of(AGREEMENTS * 853 + AGREEMENTS[:1], drift))
    assert (tmp_path / "row.json.xz").stat().st_size < 25_000


def test_quality_follows_from_the_record_alone():
    record, reference = records.of(AGREEMENTS, DRIFT), records.of(AGREEMENTS[:1] + AGREEMENTS[:1] + AGREEMENTS[2:])
    seen = records.quality(record, reference, {"value": 1.0})
    assert (seen["objects"]["value"], seen["objects"]["n"]) == (4 / 5, 5)
    assert (seen["relations"]["value"], seen["relations"]["n"]) == (1 / 2, 2)
    assert (seen["prompts_all_right"]["value"], seen["prompts_all_right"]["n"]) == (2 / 3, 3)
    assert seen["psnr_db"] == intervals.mean([31.23, 40.0, 100.0]) and seen["p99"]["value"] == 5
    assert [seen["change"][fact]["value"] for fact in ("objects", "relations", "prompts_all_right")] == [-1 / 5, -1 / 2, -1 / 3]
    assert seen["frechet"] == {"value": 1.0}


def test_without_a_drift_or_a_reference_there_is_none():
    seen = records.quality(records.of(AGREEMENTS))
    assert all(seen[name] is None for name in ("psnr_db", "ssim", "p99", "latent_cosine", "frechet", "change"))


def test_a_record_that_is_missing_or_damaged_is_one_line(tmp_path):
    with pytest.raises(UserError, match="measure its row again"):
        records.read(tmp_path / "none.json.xz")
    (tmp_path / "row.json.xz").write_bytes(b"no xz")
    with pytest.raises(UserError, match="is damaged"):
        records.read(tmp_path / "row.json.xz")
