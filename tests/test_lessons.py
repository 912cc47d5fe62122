import json

import pytest
import torch

from sdopt.bench import lessons


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_kernels_are_named_timed_and_counted(fresh_compiler):
    product = lessons.products("cpu", (64,))
    assert [row["format"] for row in product] == ["float32", "TF32", "bfloat16", "int8"]
    assert all(row["tflops"] == pytest.approx(2 * 64**3 / row["seconds"] / 1e12) for row in product)
    asked = lessons.clock("cpu", 128)
    assert 0 < asked["asked_s"] <= asked["done_s"]
    (row,) = lessons.attentions("cpu", {"pocket": (2, 4, 64, 32)})
    assert {"formula", "PyTorch's pick", "flash", "math"} == set(row["seconds"]), "a CPU has no other backends"
    assert row["picked"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    (row,) = lessons.projections("cpu", ((64, 64),))
    assert set(row["launched_s"]) == set(row["kernels_s"]) == {"three", "one"}
    (row,) = lessons.linears("cpu", ((32, 64, 64),))
    assert set(row["seconds"]) == {"half", "int8", "int8_eager", "product"} and min(row["seconds"].values()) > 0


def test_the_tradeoff_draws_what_its_rows_say():
    told = []
    variants = (lessons.Variant("euler", 3), lessons.Variant("dpm", 4, 0.0), lessons.Variant("dpm", 4, 0.5, "tiny"))
    rows = lessons.tradeoff(
        "cpu", variants, prompts=3, runs=1, batch=2, tell=lambda rows: told.append(json.dumps(rows))
    )
    assert '"quality": null' in told[0], "times are told before any picture is judged"
    assert [row["id"] for row in rows] == ["euler_3_cutoff_1_full", "dpm_4_cutoff_0_full", "dpm_4_cutoff_0.5_tiny"]
    assert [row["stages_ms"]["unet_calls"] for row in rows] == [3, 4, 4]
    assert all(row["quality"]["prompts_all_right"]["n"] == 3 for row in rows)
    far = [row["quality"]["against_60_steps"]["value"] for row in rows]
    assert all(15 < db < 50 for db in far), "the pictures are those of the reference's prompts and noise"


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lessons.main(["kernels", "--out", str(tmp_path)]) == 2
    assert "where there is one" in capsys.readouterr().err and not list(tmp_path.iterdir())
