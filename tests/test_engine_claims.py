"""What the README says of the engine's recorded studies, in bf16 and in fp8, held against their files."""

from statistics import median

import pytest

from sdopt import ratetables, report, results
from sdopt.bench import rounding

FOLDER = report.ROOT / "figures" / "data" / "nvidia-h200"
PAGE = " ".join((report.ROOT / "README.md").read_text(encoding="utf-8").split())


def rows(study):
    return {row["id"]: row for row in results.read(FOLDER / f"{study}.json")["rows"] if row["status"] == "ok"}


def seconds(row):
    return row["latency_s"]["median"]


def said(words):
    assert words in PAGE, f"the README does not say: {words}"


def test_sdxl():
    of = {i: seconds(row) for i, row in rows("sdxl-engine").items()}
    reduce, most = of["compile_reduce_overhead"], of["compile_max_autotune"]
    ours, in_fp8, by_tensor = of["engine_bf16"], of["engine_fp8"], of["engine_fp8_tensor"]
    said(f"In bf16 the engine is {reduce / ours:.2f} times as fast as `reduce-overhead` and {most / ours:.2f} times as fast as "
         f"`max-autotune`, in fp8 {reduce / in_fp8:.2f} and {most / in_fp8:.2f} times "
         f"({reduce / by_tensor:.2f} and {most / by_tensor:.2f} with one scale a tensor)")  # fmt: skip
    base, whole, whole_fp8 = of["baseline_fp32"], of["whole_path_engine"], of["whole_path_engine_fp8"]
    said(f"The whole path on the engine is {base / whole:.1f} times as fast as the baseline, in fp8 {base / whole_fp8:.1f} times")


def test_sd15():
    of = rows("sd15-engine")
    names = "engine_bf16", "compile_reduce_overhead", "eager_bf16"
    stages = [of[i]["stages_ms"] for i in names]
    ours, compiled, eager = (1000 * s["unet_calls"] / (s["unet"] + s["scheduler"]) for s in stages)
    said(f"guided loop runs at {ours:.0f} steps a second on the engine in bf16, at {compiled:.0f} under `reduce-overhead`, and at "
         f"{eager:.0f} in eager code")  # fmt: skip
    call, busy = stages[2]["unet"] / stages[2]["unet_calls"], sum(of["eager_bf16"]["unet_kernels"][0]["ms"].values())
    said(f"of a call's {call:.1f} ms the GPU works {busy:.1f}")
    said(f"({seconds(of['engine_bf16']) / seconds(of['engine_fp8']):.2f} times its bf16)")
    assert seconds(of["torchao_fp8"]) > seconds(of["compile_reduce_overhead"]), "torchao's fp8 is slower than the compiled bf16"
    first = [row["first_call_s"] for i, row in of.items() if "engine" in i]
    said(f"A first picture takes {min(first):.0f} to {max(first):.0f} s")


def test_throughput():
    of, fp8 = rows("sdxl-throughput"), "fp8_batch_{}".format
    rate = {i: row["rate"]["images_per_s"] for i, row in of.items()}
    said(f"64 pictures a call come to {rate[fp8(64)]:.2f} a second, and one alone to {rate[fp8(1)]:.2f}")
    said(f"With 64 prompts at once the engine draws {rate[fp8(64)]:.2f} pictures of Stable Diffusion XL a second, in fp8 with 20 "
         "steps")  # fmt: skip
    one, many = ({name: seen["median"] for name, seen in of[fp8(n)]["gpu"].items()} for n in (1, 64))
    said(f"one alone is drawn at {one['power_w']:.0f} W and {one['sm_clock_mhz']:,.0f} MHz, 64 at {many['power_w']:.0f} W, of at "
         f"most 700, and {many['sm_clock_mhz']:,.0f} MHz")  # fmt: skip
    assert all(row["gpu"]["power_w"]["median"] > 680 for i, row in of.items() if i != fp8(1))
    most, done = ratetables.ceilings(of.values()), {i: row["rate"]["tflops"] for i, row in of.items()}
    said(f"In bf16 the engine reaches {done['bf16_batch_64'] / most['bfloat16']:.0%} of its ceiling, in fp8 "
         f"{done[fp8(64)] / most['fp8']:.0%} of".replace("%", " %"))  # fmt: skip
    layers = [of[fp8(n)]["as_run"]["fp8_layers"] for n in (1, 2, 64)]
    assert layers[1] == layers[2]
    said(f"so that {layers[0] - layers[1]} products fewer are in fp8")
    beat = {i: done[i] / of[i]["gpu"]["sm_clock_mhz"]["median"] for i in ("bf16_batch_64", fp8(64))}
    assert beat[fp8(64)] / beat["bf16_batch_64"] == pytest.approx(1.3, abs=0.05), "notebook 13: a beat does 1.3 times as much"
    gain = [rate[f"{name}_batch_64"] / rate[f"{name}_batch_1"] - 1 for name in ("bf16", "fp8")]
    assert gain == [pytest.approx(1 / 10, abs=0.01), pytest.approx(1 / 6, abs=0.01)], "notebook 13: by a tenth and a sixth"
    timed = of[fp8(64)]["latency_s"]["runs"]
    assert max(timed) / min(timed) < 1.002, "they differ by less than a fifth of a percent"
    assert of[fp8(64)]["first_call_s"] + 4 * min(timed) > 120, "busy for two minutes: a first call, a look, three timed ones"
    assert rate[fp8(8)] / max(rate.values()) > 0.97
    said(f"Eight at once are within 3 % of all that can be had, and take {of[fp8(8)]['peak_memory_bytes'] / 2**30:.1f} GiB")
    published = [figure for row in results.read_json(report.ROOT / "figures" / "data" / "published.json")["rows"]
                 if "MLPerf" in row["source"] for figure in row["figures"] if figure["name"] == "H200"]  # fmt: skip
    said(f"MLPerf's v5.1 results for it come to {published[0]['value']:.2f} images a second for each H200")


def test_what_fp8_costs():
    metrics = results.read_json(FOLDER / "fp8-errors.json")["metrics"]
    of = next(row for row in metrics["calls"] if row["model"] == "sdxl")
    by_row, by_tensor, ours, eager = (
        of[way]["median"] for way in ("engine_fp8_row", "engine_fp8_tensor", "engine_bf16", "eager_bf16")
    )
    worst, worst_ours = (of[way]["max"] for way in ("engine_fp8_row", "engine_bf16"))
    said(f"a UNet call of Stable Diffusion XL is {by_row:.1%} off what it gives in fp32".replace("%", " %"))
    others = f"on the engine in bf16 {ours:.1%} ({worst_ours:.1%}), in eager bf16 {eager:.1%}"
    said(f"the worst {worst:.1%}), {others}".replace("%", " %"))
    assert rounding.CALLS == 6 and rounding.WAYS["engine_fp8_row"]["filter"] == "all"
    assert by_tensor <= by_row
    pictures = {row["way"]: row["psnr_db"] for row in metrics["pictures"]}
    assert pictures["engine_fp8_tensor"]["high"] >= pictures["engine_fp8_row"]["value"]
    of = {i: seconds(row) for i, row in rows("sdxl-engine").items()}
    assert of["engine_fp8"] / of["engine_fp8_tensor"] == pytest.approx(1.02, abs=0.005)
    far = max(off for row in metrics["layers"] for way, off in row["off"].items() if way.endswith("_outlier"))
    said(f"with one channel of its input 64 times as large none is more than {far:.1%} off".replace("%", " %"))
    middle = median(row["off"]["row"] for row in metrics["layers"] if row["model"] == "sdxl")
    assert by_row < middle < worst, "notebook 13: calls are less far off than layers, the worst is another matter"


def test_what_rounding_takes():
    """Notebook 13: a layer norm of most of SDXL's layers takes up to a third longer, half of what a pass would take."""
    rows = results.read_json(FOLDER / "fp8-shapes.json")["metrics"]["shapes"]
    after_norm = [row for row in rows if row["before"] == "add_layer_norm"]
    seconds = [row["seconds"] for row in after_norm if (row["rows"], row["inputs"]) == (2048, 1280)]
    longer = [s["before_row"] / s["before_bf16"] for s in seconds]
    assert len(seconds) == 3 and 1.25 < min(longer) and max(longer) < 4 / 3
    assert all(0.4 < (s["before_row"] - s["before_bf16"]) / s["pass_row"] < 0.55 for s in seconds)


def test_what_a_search_chose():
    """Why max-autotune is slower than reduce-overhead, by the kernels of a call."""
    kernels = {i: row["unet_kernels"][0]["ms"] for i, row in rows("sdxl-engine").items() if row.get("unet_kernels")}
    few, most = kernels["compile_reduce_overhead"], kernels["compile_max_autotune"]
    said(f"products of {most['matrix product']:.0f} ms a call where `reduce-overhead` has {few['matrix product']:.0f}, pointwise work "
         f"of {most['other']:.1f} ms where it has {few['other']:.1f}")  # fmt: skip
    assert abs(most["convolution"] - few["convolution"]) < 0.5
