"""Why a step may not help: the known reason for each step on each kind of device, told only when the numbers ask for one."""

from sdopt import figures
from sdopt.results import compare

# the settings that rows of a path are about
SUBJECTS = ("steps", "scheduler", "cutoff", "guidance_scale", "tf32", "int8_anyway")

REASONS = {
    "bf16": {
        "cpu": "bf16 pays on a CPU only with bf16 matrix units (AMX, AVX512-BF16) and layers large enough to fill them",
        "cuda": "half precision pays where tensor cores or memory are the limit, and here kernel launches are",
    },
    "sdpa": {
        "cpu": "attention is a small part of this UNet, and its matrices fit in the CPU's caches either way",
        "cuda": "attention over so few tokens is a small part of the step",
    },
    "compile": {
        "cpu": "convolutions and matrix products stay with oneDNN, and only the pointwise work between them can be fused",
        "cuda": "the GPU was already busy all the time, so fewer launches save little",
    },
    "fused_qkv": {
        "cpu": "one wide product costs a CPU what three narrow ones do: fusing pays where three alone do not fill "
        "the machine",
        "cuda": "the three products already filled the GPU, or the compiler hid their launches",
    },
    "int8": {
        "cpu": "every layer must first find its input's range and round it, and layers this small do not win that back",
        "cuda": "rounding the inputs costs as much as the int8 products save at these sizes",
    },
    "tiny_vae": dict.fromkeys(("cpu", "cuda"), "decoding was only {vae:.0%} of the step before"),
    "dpm_20": dict.fromkeys(("cpu", "cuda"), "the step before took {steps} steps, no more than this one"),
    "cfg_cutoff": {
        "cpu": "half the batch does not halve the time of a step, and {guided:.0%} of the steps keep the whole",
        "cuda": "half the batch no longer fills the GPU, and {guided:.0%} of the steps keep the whole",
    },
}
WIDE = 1.1  # p80 over p20: beyond it, something else was running too


def note(row, before, settings, device):
    """One line on a step that did not help, None when it did: what was measured, and the likely reason.

    `before` is the row of the step before, `settings` what the two share.
    """
    if row["id"] not in REASONS:
        return None
    ratio = compare(row, before, about=SUBJECTS)
    if row["id"] == "int8" and row.get("as_run", {}).get("int8_layers") == 0:
        return (
            "none of its layers would gain on this GPU, and none was rounded: "
            f"{ratio['speedup']:.2f}x is the difference between two processes that do the same"
        )
    if ratio["clear"] and ratio["speedup"] > 1:
        return None
    verdict = "slower than the step before" if ratio["clear"] else "no clear difference from the step before"
    return f"{verdict} ({ratio['speedup']:.2f}x), {_reason(row, before, settings, device)}"


def _reason(row, before, settings, device):
    spread = max(r["latency_s"]["p80"] / r["latency_s"]["p20"] for r in (row, before))
    if spread > WIDE:
        return f"but p80 is {spread:.2f} times p20: measure again with nothing else running"
    if waits := waits_longer(row, before):
        return f"though {waits}: measure again"
    steps, steps_before = (r["settings"].get("steps", settings["steps"]) for r in (row, before))
    if row["id"] == "dpm_20" and steps < steps_before:
        return "though it takes fewer steps: measure again"
    facts = {
        "vae": before["stages_ms"]["vae"] / 1e3 / before["latency_s"]["median"],
        "steps": steps_before,
        "guided": row["settings"].get("cutoff", 1.0),
    }
    return "likely because " + REASONS[row["id"]]["cuda" if str(device).startswith("cuda") else "cpu"].format(**facts)


def waits_longer(row, before) -> str | None:
    """That a UNet took longer whose kernels did not: launching them was slower in this row's process. None where it is not so.

    Introduced in notebooks/10_the_whole_path.
    """
    if not (row.get("unet_kernels") and before.get("unet_kernels")):
        return None
    unet, kernels = ([f(r) for r in (row, before)] for f in (lambda r: r["stages_ms"]["unet"], figures.kernels_ms))
    wide = WIDE * row["stages_ms"]["unet_calls"] / before["stages_ms"]["unet_calls"]  # a call beside a call
    if unet[0] < wide * unet[1] or kernels[0] > wide * kernels[1]:
        return None
    return (
        f"its kernels are busy for {kernels[0]:.0f} ms of the UNet's {unet[0]:.0f}, and were for {kernels[1]:.0f} of "
        f"{unet[1]:.0f}: the GPU waits for the CPU, which was slower in this row's process"
    )
