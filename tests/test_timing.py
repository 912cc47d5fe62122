import time

import pytest
import torch
from tiny import draw

from sdopt.compilation import channels_last, compile_pipeline, graphs
from sdopt.errors import UserError
from sdopt.guidance import cutoff
from sdopt.schedulers import use_scheduler
from sdopt.timing import Timing, in_turns, kernel_seconds, measure, percentile, share, stages, stopwatch


def test_the_first_call_is_apart_from_the_others():
    naps = iter([0.5, 0.02, 0.04, 0.06, 0.08, 0.1])
    timed = measure(lambda: time.sleep(next(naps)), 5, "cpu")
    assert timed.first_call_s >= 0.5
    assert len(timed.runs_s) == 5 and max(timed.runs_s) < 0.5
    assert min(timed.runs_s) <= timed.p20 < timed.median < timed.p80 <= max(timed.runs_s)


def test_percentiles_lie_between_the_runs():
    timed = Timing(9.0, (5.0, 1.0, 4.0, 2.0, 3.0), 0, "")
    assert (timed.p20, timed.median, timed.p80) == (pytest.approx(1.8), 3.0, pytest.approx(4.2))
    alone = Timing(9.0, (2.0,), 0, "")
    assert (alone.p20, alone.median, alone.p80) == (2.0, 2.0, 2.0)


def test_peak_memory_is_of_this_process_and_says_so():
    small = measure(lambda: None, 1, "cpu")
    assert 2**26 < small.peak_memory_bytes < 2**36
    assert small.peak_memory_of == "resident set of the process"


def test_no_runs_are_refused():
    with pytest.raises(UserError, match="use 1 or more"):
        measure(lambda: None, 0)


def test_stages_add_up_to_the_call_and_leave_nothing_behind(pipe):
    use_scheduler(pipe, "euler_ancestral")  # draws noise at every step, from the generator it must still be given
    expected = draw(pipe, num_inference_steps=5, **cutoff(pipe, 0.4))
    before = {part: set(vars(getattr(pipe, part))) for part in ("unet", "vae", "scheduler", "text_encoder")}
    pictures = []
    start = time.perf_counter()
    ms = stages(pipe, lambda: pictures.append(draw(pipe, num_inference_steps=5, **cutoff(pipe, 0.4))))
    whole = (time.perf_counter() - start) * 1e3
    assert list(ms) == ["text_encoder", "unet", "unet_calls", "scheduler", "vae"]
    assert ms["unet_calls"] == 5
    spent = sum(ms.values()) - ms["unet_calls"]
    assert 0.5 * whole < spent <= whole
    assert all(ms[stage] > 0 for stage in ms)
    assert {part: set(vars(getattr(pipe, part))) for part in before} == before
    assert (pictures[0] == expected).all()


def test_stages_of_a_compiled_pipeline_compile_nothing(sdxl, fresh_compiler):
    compile_pipeline(channels_last(sdxl), "whole", backend="aot_eager")
    draw(sdxl)
    slot = sdxl.unet._compiled_call_impl
    assert graphs(lambda: stages(sdxl, lambda: draw(sdxl))).compiled == 0
    assert sdxl.unet._compiled_call_impl is slot
    assert graphs(lambda: draw(sdxl)).compiled == 0


def test_one_call_with_a_pause_in_it_does_not_show_in_the_stages(sdxl):
    pauses = iter([0.0, 1.0, 0.0])
    encoded = sdxl.text_encoder.register_forward_hook(lambda *_: time.sleep(next(pauses)))
    ms = stages(sdxl, lambda: draw(sdxl, prompt="a", negative_prompt=None, guidance_scale=1.0), calls=3)
    encoded.remove()
    assert next(pauses, None) is None and ms["text_encoder"] < 1000


def test_stages_are_restored_when_the_call_fails(sdxl):
    with pytest.raises(ZeroDivisionError):
        stages(sdxl, lambda: 1 / 0)
    with pytest.raises(UserError, match="0 calls take no time"):
        stages(sdxl, lambda: 1 / 0, calls=0)
    assert "decode" not in vars(sdxl.vae) and sdxl.unet._compiled_call_impl is None


def test_kernel_seconds_are_those_of_one_call():
    assert 0.01 <= kernel_seconds(lambda: time.sleep(0.01), "cpu", repeats=3, rounds=3) < 0.03


@pytest.mark.gpu
def test_kernel_seconds_leave_launching_out():
    x = torch.randn(64, 64, device="cuda")
    launched = measure(lambda: [x + 1 for _ in range(50)], 9, "cuda").median / 50
    assert 0 < kernel_seconds(lambda: x + 1, "cuda") < launched


def test_a_stopwatch_reads_what_was_between_its_marks():
    watch = stopwatch("cpu")
    start = watch.mark()
    time.sleep(0.02)
    watch.spans.append(("nap", start, watch.mark()))
    ((name, ms),) = watch.read()
    assert name == "nap" and 20 <= ms < 200


def test_calls_take_turns_and_are_timed_apart():
    made = []
    nap = lambda name, seconds: lambda: (made.append(name), time.sleep(seconds))
    short, long = in_turns([nap("a", 0.002), nap("b", 0.02)], "cpu", rounds=3, repeats=2)
    assert 0.002 <= short < 0.02 <= long
    assert made == ["a", "a", "b", "b"] * 5, "two rounds more warm up"
    for pick, one in ((max, 0.06), (min, 0.002)):
        naps = iter([0, 0, 0.06, 0.002, 0.03])
        (seconds,) = in_turns([lambda: time.sleep(next(naps))], "cpu", rounds=3, pick=pick)
        assert one <= seconds < one + 0.028


def test_the_share_of_some_parts_is_between_none_and_all():
    class Nap(torch.nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return x

    net = torch.nn.Sequential(Nap(1, 1), Nap(1, 1), Nap(1, 1), Nap(1, 1))
    of = lambda chosen: share(net, chosen, lambda: net(torch.zeros(1)), rounds=1)
    assert of(lambda name, part: False) == 0
    assert 0.1 < of(lambda name, part: name == "0") < of(lambda name, part: name in ("0", "1", "2")) <= 1
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net), "nothing stays behind"


def test_a_percentile_that_is_none_is_refused():
    for percent in (0, 100):
        with pytest.raises(UserError, match="use 1 to 99"):
            percentile([1.0, 2.0], percent)
