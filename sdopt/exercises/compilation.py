"""Exercises of notebooks/04_compile."""

import torch

from sdopt.exercises import number


def _break_even(answer):
    return number(
        answer, 59, 59,
        "n pictures take 2.0 * n seconds, compiled 25 + 1.6 * (n - 1): the smallest whole n that makes the latter less",
        unit="pictures",
    )  # fmt: skip


def _tame(answer):
    if not callable(answer):
        return f"give a function of a tensor, not {answer!r}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator)
    for scaled in (3 * x, -3 * x.abs(), 0.1 * x, torch.zeros(4, 5)):
        largest = scaled.abs().max()
        right = scaled / largest if largest > 1 else scaled
        found = answer(scaled.clone())
        if not isinstance(found, torch.Tensor) or not torch.allclose(found, right):
            return f"for a tensor whose largest magnitude is {largest:.2f} the result differs from tame's"

    def backend(graph, inputs):  # one of our own, for which nothing can have been compiled before
        return graph.forward

    try:
        compiled = torch.compile(answer, backend=backend, fullgraph=True)(3 * x)
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"the results are right, but it does not compile in one graph: {str(error).splitlines()[0]}"
    return None if torch.allclose(compiled, 3 * x / (3 * x).abs().max()) else "compiled, it gives other results"


EXERCISES = {"04.1": _break_even, "04.2": _tame}
