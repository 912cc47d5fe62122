"""What notebooks/10_the_whole_path kept."""

import math

import pytest

from sdopt import path, results, yours
from sdopt.report import ROOT


def test_10_the_whole_path(kept):
    seen = kept("10_the_whole_path")
    assert seen["model"] == "pocket"
    assert set(seen["ids"]) == {step.id for step in path.STEPS} - {"int8"}
    assert seen["order"] == list(path.ORDER) and seen["order"][-1] == "compile"
    assert seen["unet_calls"] == 20 and seen["baseline_calls"] == 30
    assert seen["batches"] == [2] * 8 + [1] * 12, "guidance was not cut after 40 % of 20 steps"
    assert seen["same_as_by_hand"]


def test_10_the_whole_path_still_draws_what_was_asked_for(kept):
    seen = kept("10_the_whole_path")
    assert not seen["drift"]["exact"], "the path changed nothing"
    assert seen["drift"]["psnr_db"] > 25
    assert seen["objects"]["value"] > 0.8
    assert seen["speedup"] > 1 and seen["first_call_s"] > 0


def test_10_the_whole_path_refuses_what_comes_too_late(kept):
    assert kept("10_the_whole_path")["refused"] == ["fused_qkv", "int8", "tiny_vae", "dpm_20"]


def test_10_the_whole_path_keeps_the_books(kept):
    seen = kept("10_the_whole_path")
    assert "pocket on cpu-2-cores" in seen["products"] and seen["products"].keys() == seen["verdicts"].keys()
    for product in seen["products"].values():
        assert math.isclose(product["in_place"], product["whole"], rel_tol=1e-9), "gains in place multiply to the whole"
        assert product["alone"] > 1 and not math.isclose(product["alone"], product["whole"], rel_tol=1e-3)
    for verdict in seen["verdicts"].values():
        judged = [step.split()[0] for steps in verdict.values() for step in steps]
        assert len(judged) == len(set(judged)) and set(judged) < {step.id for step in path.STEPS}


def gains(ladder):
    """{step: the row before it over its own, ...} and of all the first over the last, of [(step, seconds)]."""
    found = {step: before / seconds for (_, before), (step, seconds) in zip(ladder, ladder[1:])}
    return found | {yours.ALL: ladder[0][1] / ladder[-1][1]}


def ladder_of(file):
    """What is recorded of the nine steps in a path's file: the rows beside them are of no ladder."""
    return [(row["id"], row["latency_s"]["median"]) for row in results.read(file)["rows"] if row["id"] in path.NUMBERS]


def test_10_the_whole_path_sets_yours_beside_ours(kept):
    seen = kept("10_the_whole_path")
    files = (ROOT / "figures" / "data").glob("*/pocket-path.json")
    here, there = gains(seen["ladder"]), {file.parent.name: gains(ladder_of(file)) for file in files}
    assert [step for step, _ in seen["ladder"]][-2:] == ["cfg_cutoff", "compile"] and len(here) == len(seen["ids"])
    assert [line["step"] for line in seen["beside"]] == list(there["cpu-2-cores"])
    for line in seen["beside"]:
        assert line["recorded"] == pytest.approx({name: gained[line["step"]] for name, gained in there.items()})
        if line["step"] == "int8":
            assert line["here"] is None and line["reads"] == {}
            continue
        assert line["here"] == pytest.approx(here[line["step"]])
        for name, gained in there.items():
            more, reads = line["here"] / gained[line["step"]], line["reads"][name]
            assert {"like": True, "more": more > yours.DIFFERS, "less": more < 1 / yours.DIFFERS}[reads]
    assert here[yours.ALL] == pytest.approx(seen["speedup"])


def test_10_the_whole_path_has_a_reason_for_each_step_that_differs(kept):
    seen = kept("10_the_whole_path")
    *told, paid = seen["why"]
    differ = {line["step"] for line in seen["beside"] if {"less", "more"} & set(line["reads"].values())} - {yours.ALL}
    assert differ | {"int8"} <= {line.split(":")[0] for line in told} < {step.id for step in path.STEPS}
    assert paid.startswith("compile: its first call took ") and "pictures on cpu-2-cores" in paid
