"""What the notebooks and the README say of the recorded quality study, held against its file and its records."""

import pytest

from sdopt import levels, records, report, results

FOLDER = report.ROOT / "figures" / "data" / "nvidia-h200"
STUDY = results.read(FOLDER / "pocket-quality.json")
ROWS = {row["id"]: row for row in STUDY["rows"] if row["status"] == "ok"}
AT = {i: row["quality"] for i, row in ROWS.items()}
BASE = AT["baseline_fp32"]
FP8 = ("engine_fp8", "engine_fp8_tensor")  # a scale a row, a scale a tensor


def flat(found, name=""):
    """{path: number} of nested dicts; a None has none."""
    if not isinstance(found, dict):
        return {} if found is None else {name: found}
    return {path: number for key, value in found.items() for path, number in flat(value, f"{name}.{key}").items()}


def right(i):
    return AT[i]["prompts_all_right"]


def changed(i, fact="relations"):
    """-1 where clearly fewer are right than in the baseline's pictures, 1 where clearly more, else 0."""
    change = AT[i]["change"][fact]
    return (change["low"] > 0) - (change["high"] < 0)


@pytest.mark.parametrize("i", sorted(ROWS))
def test_every_number_follows_from_the_records(i):
    kept = {name: records.read(FOLDER / "pocket-quality" / f"{name}.json.xz") for name in (i, "baseline_fp32")}
    other = kept["baseline_fp32"] if i != "baseline_fp32" else None
    again = records.quality(kept[i], other, AT[i]["frechet"])
    assert again.keys() == AT[i].keys() and flat(again) == pytest.approx(flat(AT[i]), rel=1e-9, abs=1e-12)
    assert len(kept[i]["objects_of"]) == 2560


def test_08_samplers():
    exact = ("euler", "dpm", "dpm_karras", "unipc")
    for name in exact[1:]:
        assert right(f"{name}_4_steps")["high"] < right("euler_4_steps")["low"], "with 4 steps Euler is ahead"
    for name in exact:
        for n in (15, 20, 30, 50):
            assert right("baseline_fp32")["low"] < right(f"{name}_{n}_steps")["value"] < right("baseline_fp32")["high"], (name, n)
    assert right("unipc_10_steps")["value"] < right("baseline_fp32")["low"]
    for name in ("dpm", "dpm_karras"):
        assert changed(f"{name}_8_steps", "objects") < 0 == changed(f"{name}_10_steps", "objects") == changed(f"{name}_10_steps")
    assert AT["euler_6_steps"]["change"]["prompts_all_right"]["low"] > -0.01 and 28 < AT["euler_6_steps"]["psnr_db"]["value"] < 32
    near = {i: AT[i]["psnr_db"]["value"] for i, row in ROWS.items() if row["family"] == "schedulers" and AT[i]["psnr_db"]}
    assert max((i for i in near if not i.startswith("euler")), key=near.get) == "dpm_20_steps"
    for n in (8, 10, 15, 20, 30, 50):
        assert changed(f"euler_ancestral_{n}_steps") == 1, n
    for name in ("dpm", "unipc"):  # Frechet distance calls 4 steps better than 50, with a third of the prompts lost and more
        few, many = (AT[f"{name}_{n}_steps"]["frechet"] for n in (4, 50))
        assert few["high"] < many["low"] and right(f"{name}_4_steps")["value"] < 0.67
    assert AT["dpm_karras_4_steps"]["frechet"]["low"] > BASE["frechet"]["high"], "the one failure that it sees"
    kept = {i: records.read(FOLDER / "pocket-quality" / f"{i}.json.xz") for i in ("euler_15_steps", "euler_50_steps")}
    paired = records.quality(kept["euler_50_steps"], kept["euler_15_steps"])["change"]["relations"]
    assert 0 < paired["low"] < paired["value"] < 0.01, "prompt by prompt they still differ, by less than a point"
    assert right("unipc_4_steps")["value"] < 0.55 and AT["unipc_4_steps"]["frechet"]["value"] < BASE["frechet"]["low"]


def test_09_guidance():
    lost = lambda i: -100 * AT[i]["change"]["relations"]["value"]
    assert changed("cutoff_0.4") == -1 and 0.8 < lost("cutoff_0.4") < 1.3
    assert changed("cutoff_0.6") == changed("cutoff_0.8") == 0 == changed("cutoff_0.6", "objects")
    assert lost("cutoff_0.2") > 3 * lost("cutoff_0.4") and 11 < lost("cutoff_0") < 14
    assert lost("guided_0.2_1") > 1.8 * lost("cutoff_0.4")
    assert [ROWS[i]["unet_samples"] for i in ("guided_0.2_1", "cutoff_0.4")] == [55, 42]
    swept = [AT[i]["frechet"] for i, row in ROWS.items() if row["family"] == "guidance" and i != "cutoff_0"]
    assert max(found["low"] for found in swept) < min(found["high"] for found in swept), "all overlap"
    never, always = (ROWS[i]["latency_s"]["median"] for i in ("cutoff_0", "cutoff_1"))
    assert 0.9 < never / always < 1, "guidance is a small share of the time"
    repeated = ROWS["engine_bf16"]["latency_s"]["median"], ROWS["euler_30_steps"]["latency_s"]["median"], always
    differ = max(repeated) / min(repeated) - 1
    assert 1 - never / always < differ and 0.02 < differ < 0.08, "it spares no more than rows of the same work differ by"


def test_10_and_the_readme_levels():
    chosen = levels.recommended(STUDY)
    assert 0.6 < 1 - chosen["balanced"]["latency_s"]["median"] / ROWS["engine_bf16"]["latency_s"]["median"] < 0.7
    for level, row in chosen.items():
        took = row["latency_s"]
        assert took["p80"] / took["p20"] < 1.1, "the times of the levels are steadier than the baseline's"
        for fact in levels.FACTS:
            found = row["quality"][fact]
            assert max(found["high"] - found["value"], found["value"] - found["low"]) < 0.02, (level, fact)
    assert all(changed(chosen["balanced"]["id"], fact) >= 0 for fact in levels.FACTS)
    taken, same = (ROWS[i] for i in ("euler_ancestral_8_steps", "euler_6_steps"))
    assert chosen["balanced"] is taken and changed(taken["id"]) == 1, "the README: gets more right than the baseline"
    assert taken["latency_s"]["median"] < 1.03 * same["latency_s"]["median"], "the README: in as little time as Euler's 6 steps"
    for fact in levels.FACTS:  # on the engine nothing is lost, in bf16 and in fp8
        for i in ("engine_bf16", *FP8):
            assert BASE[fact]["low"] < AT[i][fact]["value"] < BASE[fact]["high"] and changed(i, fact) >= 0


def test_10_the_front_is_samplers_and_lossless_lies_behind_it():
    assert {row["family"] for row in levels.pareto(STUDY)} == {"schedulers"}
    assert levels.recommended(STUDY)["lossless"]["id"] not in {row["id"] for row in levels.pareto(STUDY)}


def test_14_cases():
    assert min(AT, key=lambda i: AT[i]["frechet"]["value"]) == "unipc_4_steps"
    assert AT["unipc_4_steps"]["change"]["objects"]["high"] < -0.2
    assert changed("euler_6_steps") == changed("euler_6_steps", "objects") == 0
    assert AT["euler_6_steps"]["psnr_db"]["value"] < AT["tiny_vae_alone"]["psnr_db"]["value"]
    late = [AT[f"guided_0.4_{stop}"] for stop in ("0.6", "0.8", "1")]
    assert all(abs(found["psnr_db"]["value"] - AT["euler_6_steps"]["psnr_db"]["value"]) < 0.5 for found in late)
    assert all(-0.07 < found["change"]["relations"]["value"] < -0.06 for found in late)
    assert all(AT[i]["frechet"]["low"] < AT["unipc_4_steps"]["frechet"]["high"] for i in ("euler_6_steps", "euler_ancestral_10_steps"))
    seed = AT["noise_seed"]["change"]["relations"]
    assert seed["low"] < -0.008 and seed["high"] > 0.008


def test_what_the_readme_says_of_the_steps():
    lost = {i: -100 * AT[f"{i}_alone"]["change"]["relations"]["value"] for i in ("tiny_vae", "dpm_20", "cfg_cutoff")}
    assert changed("cfg_cutoff_alone") == changed("tiny_vae_alone") == -1 and lost["cfg_cutoff"] == pytest.approx(1, abs=0.15)
    assert lost["tiny_vae"] == pytest.approx(lost["cfg_cutoff"] / 2, rel=0.2)
    assert changed("dpm_20_alone") >= 0 and changed("dpm_20_alone", "objects") >= 0
    assert round(AT["dpm_20_alone"]["psnr_db"]["value"]) == 46 and [round(AT[i]["psnr_db"]["value"]) for i in FP8] == [42, 43]
    points = {fact: round(100 * AT["cfg_cutoff"]["change"][fact]["value"], 1) for fact in levels.FACTS}
    db = {i: round(AT[i]["psnr_db"]["value"], 1) for i in ("cfg_cutoff", "tiny_vae", "fused_qkv", "int8_every_layer")}
    ms = {i: round(1e3 * ROWS[i]["latency_s"]["median"]) for i in ("int8_filter", "fused_qkv")}
    assert points == {"objects": -0.6, "relations": -1.3} and db["cfg_cutoff"] == 31.8 and db["int8_every_layer"] == 48.5
    assert db["tiny_vae"] - db["cfg_cutoff"] < 1.5 < 15 < db["fused_qkv"] - db["tiny_vae"], "the drift is the tiny VAE's"
    assert not any(changed(i, fact) for i in ("int8_filter", "int8_every_layer") for fact in levels.FACTS)
    assert ms == {"int8_filter": 90, "fused_qkv": 52}


def test_13_fp8_drifts_and_loses_nothing():
    for row in (AT[i] for i in FP8):
        assert row["psnr_db"]["high"] < AT["engine_bf16"]["psnr_db"]["low"] - 5, "several decibels beyond bf16"
        assert all(row["change"][fact]["low"] > -0.005 for fact in levels.FACTS)
