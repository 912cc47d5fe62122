"""Answers to the exercises of 02_bf16, and mistakes that are often made."""

import torch

from sdopt import precision


def cast(pipe, dtype):
    for name, part in pipe.components.items():  # SDXL has two text encoders
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(dtype)
    return pipe


def there_and_back(pipe, dtype):
    precision.half_precision(pipe, dtype)
    pipe.vae.to(torch.float32)
    return pipe


def always_bfloat16(pipe, dtype):
    return cast(pipe, torch.bfloat16)


# 2.1: 8 significant bits (7 stored and the leading 1) count to 2 ** 8; 257 would need a ninth.
ANSWERS = {"02.1": 256, "02.2": cast}

MISTAKES = {
    "02.1": [128, 255, 65504, "256"],  # 7 bits stored; one too few; float16's largest; a text
    "02.2": [lambda pipe, dtype: pipe.to(dtype), lambda pipe, dtype: pipe.unet.to(dtype), there_and_back, always_bfloat16, 3],
}
