"""Answers to the exercises of 02_bf16, and mistakes that are often made."""


def cast(pipe, dtype):
    pipe.text_encoder.to(dtype)
    pipe.unet.to(dtype)
    return pipe


# 2.1: 8 significant bits (7 stored and the leading 1) count to 2 ** 8; 257 would need a ninth.
ANSWERS = {"02.1": 256, "02.2": cast}

MISTAKES = {
    "02.1": [128, 255, 65504, "256"],  # 7 bits stored; one too few; float16's largest; a text
    "02.2": [lambda pipe, dtype: pipe.to(dtype), lambda pipe, dtype: pipe.unet.to(dtype), 3],
}
