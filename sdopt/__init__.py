"""Stable Diffusion inference, from a slow fp32 baseline to the fastest measured, one honest step at a time."""

import os

# Set before torch, diffusers or torchao is imported: each prints warnings that are no news to a reader of the course.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

__version__ = "0.1.0"
