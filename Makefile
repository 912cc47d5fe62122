# `make run` walks the nine steps with pocket; `make test` runs the tests. Both set up .venv first, once.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
# OpenMP threads that spin long while they wait starve each other on a busy machine.
export GOMP_SPINCOUNT ?= 1000
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
FIRST := $(foreach n,04 13 14,$(filter notebooks/$(n)_%,$(NOTEBOOKS)))
LONG := $(foreach n,quality_gate engine_fp8 resume cli fp8 oracle float8_compiles compilation,tests/test_$(n).py)

.PHONY: run test report lab notebooks badges clean

run: $(INSTALLED)
	$(BIN)/sdopt run --model pocket --out out

# Two processes with a thread each. The notebooks first, for they time things; the tests look at what they kept. Nothing is
# found compiled from before: notebook 04, which begins, times a first call, which compiles. The longest do not come last,
# neither among the notebooks nor among the files of tests, which would go by how many tests they hold.
test: export OMP_NUM_THREADS := 1
test: export SDOPT_KEEP := $(abspath $(VENV))/kept
test: export TORCHINDUCTOR_CACHE_DIR := $(abspath $(VENV))/compiled
test: $(INSTALLED)
	rm -rf $(SDOPT_KEEP) $(TORCHINDUCTOR_CACHE_DIR)
	$(BIN)/python -m pytest -q -n 2 $(FIRST) $(filter-out $(FIRST),$(NOTEBOOKS))
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(LONG) tests

lab: $(INSTALLED)
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

notebooks: $(INSTALLED)
	$(BIN)/python -m sdopt.notebooks execute

badges: $(INSTALLED)
	$(BIN)/python -m sdopt.notebooks badges $(REPO)

report: $(INSTALLED)
	$(BIN)/sdopt report

# torch comes first and alone: nothing installed after it, held by the constraints, may replace it by another build.
# The stamp is written last, so that an interrupted installation is done again.
$(INSTALLED): constraints.txt requirements.txt pyproject.toml
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) out
