"""Exercises of notebooks/10_the_whole_path."""

from sdopt.exercises import number

ASKED = ("compile", "int8", "bf16", "tiny_vae", "fused_qkv")
RULES = (  # (earlier, later, why)
    ("tiny_vae", "fused_qkv", "what is fused should be there to stay, so replace the VAE first"),
    ("tiny_vae", "int8", "what is quantised should be there to stay, so replace the VAE first"),
    ("bf16", "int8", "quantised weights are no longer cast: choose the float first"),
    ("fused_qkv", "int8", "quantised projections cannot be laid side by side: fuse first"),
    *((i, "compile", f"'{i}' changes modules that were compiled: compile last") for i in ASKED[1:]),
)


def _order(answer):
    if not isinstance(answer, (list, tuple)) or sorted(map(str, answer)) != sorted(ASKED):
        return f"give a list of these five ids, each once: {', '.join(ASKED)}"
    return next((why for early, late, why in RULES if answer.index(early) > answer.index(late)), None)


def _whole(answer):
    for stages, faster, right in (
        ({"unet": 900.0, "vae": 100.0}, {"unet": 2.0, "vae": 4.0}, 1000 / 475),
        ({"unet": 500.0, "vae": 100.0, "text_encoder": 20.0}, {"vae": 10.0}, 620 / 530),
    ):
        wrong = number(
            answer(dict(stages), dict(faster)), 0.999 * right, 1.001 * right,
            f"for {stages} made faster by {faster} it should be {right:.3f}: add up the new times, then divide",
        )  # fmt: skip
        if wrong:
            return wrong
    return None


def _row(id, p20, median, p80):
    latency = {"median": median, "p20": p20, "p80": p80, "runs": [p20, median, p80]}
    return {"id": id, "settings": {}, "status": "ok", "latency_s": latency}


def _keep(answer):
    rows = [
        _row("baseline_fp32", 3.9, 4.0, 4.1),
        _row("bf16", 3.84, 3.86, 3.88),  # by little, but clearly
        _row("sdpa", 3.2, 3.4, 3.85),  # faster by much, not clearly
        _row("int8", 4.4, 4.5, 4.6),  # clearly slower
        _row("tiny_vae", 4.2, 4.25, 4.3),  # clearly faster than the row before, though not than bf16
    ]
    given = answer(rows)
    if not isinstance(given, (list, tuple)):
        return f"return a list of ids, not {given!r}"
    for id, kept, why in (
        ("baseline_fp32", False, "has no row before it"),
        ("bf16", True, "is clearly faster than the row before it"),
        ("sdpa", False, "overlaps with the row before it: its p80 is above that row's p20"),
        ("int8", False, "is clearly slower than the row before it"),
        ("tiny_vae", True, "is clearly faster than the row before it, which is int8"),
    ):
        if (id in given) != kept:
            return f"'{id}' {why}: {'keep it' if kept else 'it does not belong in the list'}"
    return None if len(given) == 2 else "name each id once, and no other"


EXERCISES = {"10.1": _order, "10.2": _whole, "10.3": _keep}
