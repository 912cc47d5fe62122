"""Answers to the exercises of 09_cfg_cutoff, and mistakes that are often made."""


def combine(both, scale):
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def drop(pipe, step, timestep, tensors):
    if step + 1 == 3:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        pipe._guidance_scale = 1.0
    return tensors


def from_conditional(both, scale):
    unconditional, conditional = both.chunk(2)
    return conditional + scale * (conditional - unconditional)


def first_and_second_row(both, scale):
    return both[:1] + scale * (both[1:2] - both[:1])


def alternating(both, scale):
    return both[::2] + scale * (both[1::2] - both[::2])


def cut(rows, when, scale=1.0):
    def callback(pipe, step, timestep, tensors):
        if step == when:
            tensors["prompt_embeds"] = rows(tensors["prompt_embeds"])
            pipe._guidance_scale = scale
        return tensors

    return callback


# 9.1: 12 guided steps of 2 x 2 samples and 18 steps of 2.
ANSWERS = {"09.1": 84, "09.2": combine, "09.3": drop}

MISTAKES = {
    "09.1": [42, 60, 120, "84"],  # one prompt; none guided; all guided; a text
    "09.2": [from_conditional, first_and_second_row, alternating, lambda both, scale: scale * both],
    "09.3": [
        cut(lambda both: both[-1:], 2),  # the last row alone
        cut(lambda both: both.chunk(2)[0], 2),  # the unconditional half
        cut(lambda both: both.chunk(2)[1], 3),  # a step late
        cut(lambda both: both.chunk(2)[1], 2, scale=3.0),  # the scale as it was
        lambda pipe, step, timestep, tensors: None,
        3,
    ],
}
