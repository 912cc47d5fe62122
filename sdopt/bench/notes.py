"""Why a step may not help: the known reason for each step on each kind of device, told only when the numbers ask."""

from sdopt.results import compare

SUBJECTS = ("steps", "scheduler", "cutoff")  # the settings that steps of the path are about

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
    "tiny_vae": {
        "cpu": "decoding happens once a picture, so little time was there to win",
        "cuda": "decoding happens once a picture, so little time was there to win",
    },
    "dpm_20": {
        "cpu": "the other rows took 20 steps or fewer already",
        "cuda": "the other rows took 20 steps or fewer already",
    },
    "cfg_cutoff": {
        "cpu": "too few steps came after the cutoff",
        "cuda": "after the cutoff the batch is half as large, and half a batch no longer fills the GPU",
    },
}


def note(row, before, device):
    """One line on a step that did not help, None when it did: what was measured against `before`, and the reason."""
    reason = REASONS.get(row["id"], {}).get("cuda" if str(device).startswith("cuda") else "cpu")
    if reason is None:
        return None
    ratio = compare(row, before, about=SUBJECTS)
    if ratio["clear"] and ratio["speedup"] > 1:
        return None
    verdict = "slower than the step before" if ratio["clear"] else "no clear difference from the step before"
    return f"{verdict} ({ratio['speedup']:.2f}x), likely because {reason}"
