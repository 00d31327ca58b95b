# Each target does all the set-up it needs: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
SOURCES := ib_analysis kernels data tests
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# uv does not read PIP_FIND_LINKS, and separates by commas what pip separates by spaces.
comma := ,
empty :=
space := $(empty) $(empty)
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

.PHONY: setup demo check test test-interpreted test-lowest test-some test-gpu compile bench-gpu lint clean

setup: $(READY)

# PyTorch comes first: a local wheel if pip knows one, then the build for this machine's driver, then whatever the index has.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip install --quiet --no-index --no-deps $(TORCH) \
		|| VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --torch-backend=auto $(TORCH) \
		|| $(BIN)/python -m pip install $(TORCH)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -c constraints.txt -e ".[dev,notebooks]"
	touch $(READY)

demo: setup
	$(BIN)/ib-analysis demo

# Waiting threads sleep: spinning ones, the default, are twice as fast alone but crawl when cores are shared.
check test test-interpreted: export OMP_WAIT_POLICY ?= PASSIVE
# Only the first of many processes compiles what all import, even where a user's Python keeps no bytecode: seconds each.
check test test-interpreted: export PYTHONDONTWRITEBYTECODE :=
check: export OMP_NUM_THREADS ?= 1

# What a person runs before a commit: lint, types and every test that takes no more than a few seconds.
check: lint
	$(PYTEST) -m "not slow"

test: setup
	$(PYTEST)
	$(MAKE) test-interpreted

# The kernels on a CPU. Triton decides when it is imported whether it interprets, so these tests have a process of their own.
test-interpreted: export TRITON_INTERPRET := 1
test-interpreted: setup
	$(PYTEST) tests/kernels/interpreted

# Everything on the lowest versions that pyproject.toml names, in an environment of its own; `TESTS="tests/cache"` runs some.
# LOWEST_TORCH="--override FILE" takes another PyTorch, where no index has a small build of the lowest.
LOWEST_TORCH ?= --torch-backend=cpu
TESTS ?=
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(CURDIR)/.venv-lowest .venv-lowest/bin/uv pip install --resolution lowest-direct $(LOWEST_TORCH) \
		-e ".[test,notebooks]"
	touch .venv-lowest/.ready # so that make installs nothing else
	$(MAKE) BIN=.venv-lowest/bin READY=.venv-lowest/.ready $(if $(TESTS),test-some,test)

test-some: setup
	$(PYTEST) $(TESTS)

# The tests of the kernels where there is a GPU: those of tests/kernels/interpreted run compiled there, and at more shapes. What
# takes time is compiling, on all cores.
test-gpu: setup
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs a CUDA GPU")'
	$(BIN)/python -m pytest -n auto tests/kernels tests/cache/test_on_gpu.py

# Machine code of every variant of the kernels, for GPUs that are not here. Goes on where it stopped.
compile: setup
	$(BIN)/python kernels/benchmarks/compile.py --csv kernels/benchmarks/compiled.csv

# Correctness first, then every time and its target. Goes on where it stopped; see kernels/benchmarks/README.md.
bench-gpu: test-gpu
	$(BIN)/python kernels/benchmarks/bench_gpu.py --csv kernels/benchmarks/gpu.csv --table kernels/benchmarks/gpu.md

lint: setup
	$(BIN)/ruff check $(SOURCES) notebooks
	$(BIN)/ruff format --check $(SOURCES) notebooks
	$(BIN)/mypy $(SOURCES)

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
