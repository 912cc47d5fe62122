import pytest
import torch
from tiny import tiny_sdxl

from sdopt import models

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


@pytest.fixture
def fresh_compiler():
    """No graphs from tests before, none left for those after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
