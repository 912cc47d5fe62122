"""The rows of the quality studies as data: on which pipeline each draws, and how it samples."""

from dataclasses import dataclass, replace

from sdopt import path, quantization
from sdopt.bench import recipes
from sdopt.bench.row import Recipe
from sdopt.guidance import samples

NINE = tuple(path.NUMBERS)
REFERENCE = NINE[0]
YARDSTICK, OTHER_NOISE = "noise_bf16", "noise_seed"
OTHER_SEED = 2_000_000  # where the seeds of another noise begin: neither the latents' nor the steps' own (see drawing)
CALLS = ("dpm_20", "cfg_cutoff")  # the steps that change how is sampled, and no module
SCHEDULERS = ("euler", "euler_ancestral", "dpm", "dpm_karras", "unipc")
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)
CUTOFFS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STARTS, STOPS = (0.1, 0.2, 0.4), (0.4, 0.6, 0.8, 1.0)  # of guidance in an interval; from 0 on it is a cutoff
CUT = path.Options().cutoff
FEW = 3  # runs that are timed of a row whose pictures take seconds each


@dataclass(frozen=True)
class Sampled(Recipe):
    """A row of a quality study: a pipeline (a recipe; rows of one `pipeline` share it) and how it samples.

    `scheduler` and `num_steps` None are the study's own; guided from `start` to `stop`, shares of the steps; `seed` is
    where the pictures' seeds begin; `batch` how many a call that is timed, None: the study's. `slow`: a picture takes
    seconds, and FEW runs are timed.
    """

    pipeline: str = ""
    family: str = "path"
    scheduler: str | None = None
    num_steps: int | None = None
    start: float = 0.0
    stop: float = 1.0
    seed: int = 0
    slow: bool = False
    batch: int | None = None

    def runs(self, runs):
        """How many runs are timed where the study's own number is `runs`."""
        return min(runs, FEW) if self.slow else runs

    def timed_with(self, shared):
        """The batch and the runs it is timed with, as a study's `shared` settings name them."""
        return {"runs": self.runs(shared["runs"]), "batch": self.batch or shared["batch"]}

    @property
    def compares(self):
        """Whether its drift from the reference is measured: not where another noise is drawn, at the start or on the way."""
        return self.id != REFERENCE and self.seed == 0 and self.scheduler != "euler_ancestral"

    def samples(self, steps):
        """How many samples the UNet sees for one picture, where the study's own number of steps is `steps`."""
        return samples(self.num_steps or steps, self.start, self.stop)

    def differs(self, shared):
        """Its settings beside the study's `shared` ones, as a result file names them."""
        own = {"scheduler": self.scheduler or shared["scheduler"], "steps": self.num_steps or shared["steps"]}
        own |= self.timed_with(shared)
        own = {key: value for key, value in own.items() if value != shared[key]}
        if self.start:
            own |= {"start": self.start, "stop": self.stop}
        elif self.stop < 1:
            own |= {"cutoff": self.stop}
        return own | ({"seed": self.seed} if self.seed else {}) | self.settings


def rows(device, steps):
    """The rows of `pocket-quality`, those that share a pipeline one after another.

    The row `bf16` is bf16 alone as well, for before it there is the baseline only. int8 alone, `int8_filter` and
    `int8_every_layer` round layers even where none gains in speed. On a GPU the sweeps draw on the engine, where few
    steps are as fast as they can be; on a CPU eagerly.
    """
    seed = Sampled(
        OTHER_NOISE, "the baseline from other noise", NINE[:1], pipeline=REFERENCE, family="noise", seed=OTHER_SEED
    )
    stock = Sampled(YARDSTICK, "bf16 and nothing else", ("bf16",), pipeline=YARDSTICK, family="noise")
    baseline, *upon = (_upon(i, steps) for i in NINE)
    calls = [_alone(i, steps) for i in CALLS]
    alone = [_alone(i, steps) for i in NINE[2:] if i not in CALLS]
    return [baseline, seed, *calls, *alone, *upon, *_int8(), stock, *_sweeps(device)]


def gate_rows(steps):
    """The rows of `pocket-gate`, for a CPU: the steps upon each other in fp32, without `compile`; bf16 and int8 each apart.

    In fp32 another CPU draws the same but for a level here and there. In bf16 and int8 it does not, and what a later step
    does would be lost in that.
    """
    apart = ("bf16", "compile", "int8")
    upon = [_upon(i, steps) for i in NINE if i != "compile"]
    return [replace(row, steps=tuple(i for i in row.steps if i == row.id or i not in apart)) for row in upon]


def _upon(i, steps):
    """Step `i` with all that come before it."""
    n = path.NUMBERS[i]
    kept = tuple(step for step in NINE[:n] if step not in CALLS)
    sampled = {key: value for step in CALLS if step in NINE[:n] for key, value in sampling(step, steps).items()}
    return Sampled(i, path.STEPS[n - 1].title, kept, pipeline=kept[-1], **sampled)


def _alone(i, steps):
    """Step `i` upon the baseline."""
    label = f"{path.STEPS[path.NUMBERS[i] - 1].title}, alone"
    more = {"pipeline": f"{i}_alone", "family": "alone"}
    if i in CALLS:
        return Sampled(f"{i}_alone", label, NINE[:1], **more | {"pipeline": REFERENCE} | sampling(i, steps))
    anyway = {"int8_anyway": True} if i == "int8" else {}  # torchao's int8, which is made for a compiler, takes seconds
    return Sampled(f"{i}_alone", label, (REFERENCE, i), anyway, settings=anyway, slow=bool(anyway), **more)


def sampling(i, steps):
    """How is sampled with step `i`, one of CALLS, where the study's own number of steps is `steps`."""
    return {"scheduler": "dpm", "num_steps": min(20, steps)} if i == "dpm_20" else {"stop": CUT}


def _int8():
    anyway, upto = {"int8_anyway": True}, NINE[: path.NUMBERS["int8"]]
    every = tuple(i for i in upto if i not in ("compile", "int8"))
    return [
        Sampled("int8_filter", "int8 by its filter", upto, anyway, None, anyway, pipeline="int8_filter", family="int8"),
        Sampled(
            "int8_every_layer",
            "int8 in every layer",
            every,
            apply=recipes.int8_every_layer,
            settings={"int8_every_layer": True},
            compiled=True,
            pipeline="int8_every_layer",
            family="int8",
        ),
    ]


def _sweeps(device):
    """Schedulers by steps, and guidance, on the engine (a GPU) or eagerly; first the engine by itself."""
    engine = str(device).startswith("cuda")
    apply = recipes.on_engine if engine else None

    def swept(i, label, family, **sampling):
        return Sampled(i, label, ("bf16", "sdpa"), apply=apply, pipeline="sweeps", family=family, **sampling)

    grid = [
        swept(f"{name}_{n}_steps", f"{name}, {n} steps", "schedulers", scheduler=name, num_steps=n)
        for name in SCHEDULERS
        for n in STEPS
    ]
    guided = [swept(f"cutoff_{stop:g}", f"guided up to {stop:.0%}", "guidance", stop=stop) for stop in CUTOFFS]
    guided += [
        swept(f"guided_{start:g}_{stop:g}", f"guided from {start:.0%} to {stop:.0%}", "guidance", start=start, stop=stop)
        for start in STARTS
        for stop in STOPS
        if start < stop
    ]
    return [*([swept("engine_bf16", "bf16, our engine", "engine")] if engine else []), *grid, *guided, *_fp8(device)]


def _fp8(device):
    """The engine in fp8, in every layer it can round, for pocket's are small: with a scale a row, and with one a tensor."""
    kinds = {"engine_fp8": "row", "engine_fp8_tensor": "tensor"} if quantization.has_fp8(device) else {}
    return [
        Sampled(
            i,
            f"fp8, our engine, a scale a {scales}",
            ("bf16", "sdpa"),
            apply=recipes.in_fp8("all", scales),
            pipeline=i,
            family="engine",
        )
        for i, scales in kinds.items()
    ]
