import json
import os
import tempfile
from pathlib import Path

import nbformat
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported: it is decorated for one or the other

from tiny import tiny_sdxl

from sdopt import models
from sdopt.course import KEEP_IN, KEPT

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
os.environ.setdefault(KEEP_IN, tempfile.mkdtemp(prefix="sdopt-kept-"))  # notebooks run before the tests keep here

PIPELINES = {"pocket": lambda: _quiet(models.load("pocket")), "sdxl": lambda: _quiet(tiny_sdxl())}


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def pocket():
    return PIPELINES["pocket"]()


@pytest.fixture
def sdxl():
    """A random SDXL pipeline, 2x down, 2 levels."""
    return PIPELINES["sdxl"]()


@pytest.fixture(params=PIPELINES)
def pipe(request):
    """Each of the two in turn."""
    return PIPELINES[request.param]()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run: interpreted on a CPU where there is no GPU, and on a GPU as they are compiled."""
    from sdopt.kernels import launch

    if request.param == "cpu" and not launch.INTERPRETED:
        pytest.skip("a GPU is there, and Triton compiles for it")
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def fresh_compiler():
    """No graphs from tests before, none left for those after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["committed", "run"])
def kept(request):
    """A function of a notebook's name: what it kept, in its committed outputs and when it ran just now."""

    def read(name):
        if request.param == "run":
            path = Path(os.environ[KEEP_IN]) / f"{name}.json"
            if not path.exists():
                pytest.skip("the notebook was not run before the tests: `make test` does")
            return json.loads(path.read_text())
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
        outputs = [
            o["data"][KEPT] for c in cells if c.cell_type == "code" for o in c.outputs if KEPT in o.get("data", {})
        ]
        return next(o["values"] for o in outputs if o["name"] == name)

    return read
