import pytest
import torch
from made_up import row as made_up_row
from tiny import draw

from sdopt import path, quantization, report
from sdopt.bench import ledger, recipes, studies
from sdopt.bench.judge import Judge
from sdopt.bench.row import Recipe
from sdopt.cli import main
from sdopt.compilation import compiled_kind
from sdopt.errors import UserError

EXTRAS = ["baseline_tf32", "baseline_strict"]


@pytest.mark.parametrize("name", ["pocket-path", "sd15-path", "sdxl-path"])
def test_a_path_study_has_the_nine_steps_and_the_other_two_baselines(name, monkeypatch):
    study = studies.study(name)
    rows = studies.rows_of(study, "cpu", 30)
    assert [row.id for row in rows] == [*path.NUMBERS, *EXTRAS, "recommended"]
    assert all(row.steps == tuple(path.NUMBERS)[:n] for n, row in enumerate(rows[:9], 1))
    assert [row.options["tf32"] for row in rows[9:11]] == ["everywhere", "nowhere"]
    assert rows[11].steps == path.worthwhile("cpu") and rows[11].label == "the path without fused_qkv and int8"
    monkeypatch.setattr(path, "worthwhile", lambda gpu: tuple(path.NUMBERS))
    monkeypatch.setattr(quantization, "gains_nowhere", lambda device: True)
    ids = [row.id for row in studies.rows_of(study, "cuda", 30)]
    assert ids == [*path.NUMBERS, *EXTRAS, "int8_anyway"], "what leaves nothing out would be measured twice"


def test_a_peer_study_has_these_rows(monkeypatch):
    monkeypatch.setattr(quantization, "has_fp8", lambda device: False)
    rows = studies.rows_of(studies.study("sdxl-peers"), "cuda", 30)
    assert [row.id for row in rows] == [
        *("eager_fp16", "eager_bf16", "compile_reduce_overhead", "compile_max_autotune", "tutorial_recipe"),
        *("sdpa_math", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "xformers"),
    ]
    compiles = [row.id for row in rows if row.compiles]
    engine = studies.rows_of(studies.study("sdxl-engine"), "cuda", 30)
    assert [row.id for row in engine] == [
        "baseline_fp32",
        *(row.id for row in rows),
        "engine_bf16",
        "whole_path_engine",
    ]
    assert engine[-1].steps == ("baseline_fp32", "bf16", "sdpa", "tiny_vae", "dpm_20", "cfg_cutoff")
    assert compiles == ["compile_reduce_overhead", "compile_max_autotune", "tutorial_recipe"]


@pytest.mark.parametrize(("name", "layers"), [("sdxl-engine", "measured"), ("sd15-engine", "measured"), ("pocket-engine", "all")])
def test_where_the_gpu_has_it_the_engines_studies_have_rows_in_fp8(name, layers, monkeypatch):
    monkeypatch.setattr(quantization, "has_fp8", lambda device: True)
    *_, before, torchaos, engines, tensor, whole = studies.rows_of(studies.study(name), "cuda", 30)
    assert [row.id for row in (before, torchaos, engines, tensor, whole)] == [
        *("whole_path_engine", "torchao_fp8", "engine_fp8", "engine_fp8_tensor", "whole_path_engine_fp8")
    ]
    asked = []
    monkeypatch.setattr("sdopt.engine.prepare", lambda pipe, **settings: asked.append(settings))
    for row in (engines, whole, tensor):
        row.apply(None)
    assert asked == [{"precision": "fp8", "filter": layers, "scales": scales} for scales in ("row", "row", "tensor")]
    assert torchaos.compiles and torchaos.steps == engines.steps == ("bf16", "sdpa") and whole.steps == before.steps
    quality = {row.id: row for row in studies.rows_of(studies.study("pocket-quality"), "cuda", 30)}
    assert quality["engine_fp8"].pipeline != quality["engine_fp8_tensor"].pipeline != quality["engine_bf16"].pipeline


def test_rows_are_chosen_by_id_in_their_own_order():
    rows = studies.nine(30)
    assert [row.id for row in studies.chosen(rows, "sdpa,bf16")] == ["bf16", "sdpa"]
    assert studies.chosen(rows, None) is rows
    with pytest.raises(UserError, match="unknown row 'int4': choose from baseline_fp32, bf16"):
        studies.chosen(rows, "bf16,int4")


def test_an_estimate_counts_what_a_row_will_do():
    row = made_up_row("compile", 2.0, first_calls={"cold_s": 90.0, "warm_s": 20.0, "compiled": 2, "found": 0})
    failed = {"id": "int8", "status": "failed: out of memory"}
    shared = studies.settings("pocket", runs=5)
    recorded = {"settings": shared, "rows": [made_up_row("bf16", 1.0), row, failed]}
    took = studies.estimate(studies.nine(30), recorded, shared)
    assert took == {"bf16": 15.0 + 3.0 + 8 * 1.0, "compile": 2 * 15.0 + 110.0 + 8 * 2.0}
    assert studies.estimate(studies.nine(30), None, shared) == {}
    assert studies.estimate(studies.nine(30), recorded, shared | {"height": 64}) == {}, "that was another size"


def test_a_dry_run_lists_the_rows_and_writes_nothing(capsys, tmp_path, monkeypatch):
    recorded = {"settings": studies.settings("pocket"), "rows": [made_up_row("bf16", 1.0)]}
    monkeypatch.setattr(report, "recorded", lambda machine, study: recorded)
    assert main(["bench", "pocket-path", "--dry-run", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(i in out for i in (*path.NUMBERS, *EXTRAS, "recommended")) and "26 s" in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_what_is_done_and_what_would_be_refused(capsys, tmp_path):
    shared = studies.settings("pocket")
    about = ledger.head("pocket-path", shared, "cpu", Judge(shared).prompts, "bench")
    ledger.Ledger(tmp_path / "pocket-path.json", about, ["bf16"]).put(made_up_row("bf16", 1.0))
    asked = ["bench", "pocket-path", "--dry-run", "--device", "cpu", "--out", str(tmp_path)]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "half precision" in out and "  done\n" in out and " rows left of " in out
    assert main([*asked, "--steps", "5"]) == 2
    assert "measured with another steps: give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sd3-path"], "unknown study 'sd3-path': choose one of pocket-path, sd15-path"),
        (["pocket-path", "--only", "fp4"], "unknown row 'fp4': choose from baseline_fp32"),
        (["sdxl-throughput", "--only", "fp8_batch_8"], "(rows in fp8 need a GPU of compute capability 8.9 or later): choose from bf16"),
        (["pocket-path", "--runs", "0"], "--runs 0 is too few"),
        (["sdxl-throughput", "--batch", "8"], "--batch is not for sdxl-throughput"),
        (["pocket-path", "--limit", "soon"], "invalid float value: 'soon'"),
        (["pocket-path", "--limit", "-1"], "--limit -1 is no time a call may take"),
        (["pocket-path", "--limit", "nan"], "--limit nan is no time a call may take"),
        (["pocket-path", "--weights", "random"], "pocket has its own weights, random ones would say nothing"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, argv, said):
    assert main(["bench", *argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert not list((tmp_path / "out").glob("*.json"))


def test_the_tutorials_recipe_draws_the_same_picture(pocket, fresh_compiler, monkeypatch):
    """All of it but the compiler's search, which is for GPUs: fused, in int8, channels_last, UNet and decoder compiled."""
    options = []

    def compile_without_search(module, fullgraph, options):
        asked.append((fullgraph, options))
        return module

    asked = options
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_search)
    monkeypatch.setattr(torch, "compile", compile_without_search)
    before = draw(pocket, num_inference_steps=2)
    recipes.tutorial(pocket)
    assert [fullgraph for fullgraph, _ in asked] == [True, True], "the UNet and the decoder"
    wanted = {
        **{"max_autotune": True, "triton.cudagraphs": True, "coordinate_descent_tuning": True},
        **{"coordinate_descent_check_all_directions": True, "epilogue_fusion": False, "conv_1x1_as_mm": True},
        "force_fuse_int_mm_with_mul": True,
    }
    assert all(wanted.items() <= flags.items() for _, flags in asked)
    assert quantization.int8_layers(pocket) > 0
    assert pocket.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert abs(draw(pocket, num_inference_steps=2) - before).mean() < 0.02


def test_the_stock_modes_are_pytorchs_own_without_a_flag_of_ours(pocket, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: asked.append((module, settings)))
    for recipe in studies.PEERS:
        if recipe.id.startswith("compile_"):
            recipe.apply(pocket)
    parts = [pocket.unet, pocket.vae.decoder]
    assert [module for module, _ in asked] == parts * 2
    assert all(settings.pop("fullgraph") and settings.keys() == {"options"} for _, settings in asked)
    options = [settings["options"] for _, settings in asked]
    assert all(flags == torch._inductor.list_mode_options("reduce-overhead") for flags in options[:2])
    for flags in options[2:]:
        assert flags == torch._inductor.list_mode_options("max-autotune")
    assert pocket.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_xformers_that_cannot_attend_is_a_reason(pocket, monkeypatch):
    monkeypatch.setattr("sdopt.attention.xformers_state", lambda: "it is not installed: pip install xformers")
    with pytest.raises(UserError, match="pip install xformers"):
        recipes.xformers(pocket)
    assert compiled_kind(pocket) is None


def test_what_is_recorded_of_a_recipe_can_be_sent_to_another_process():
    import pickle

    for study in studies.STUDIES.values():
        for recipe in studies.rows_of(study, "cpu", 30):
            assert isinstance(pickle.loads(pickle.dumps(recipe)), Recipe)
