"""Stable Diffusion inference, from a slow fp32 baseline to the fastest measured, one honest step at a time."""

import logging
import os

# Set before torch, diffusers, torchao or xformers is imported: each warns about kernels that do not load on this
# machine, which is no news to a reader; where it matters the step itself says so.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for _name in ("torchao", "xformers", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
