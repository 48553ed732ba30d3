# Every target does its own set-up in $(VENV). Only Python 3.10 or newer, with its venv module,
# and a C++ compiler are assumed; CMake, Ninja and the rest are wheels.
#
#   make test TORCH="torch==2.11.0"        another torch, before the first set-up
#   make test ARGS="-k lengths -x"         what follows goes to the command that is run
#   make test JOBS=0                       the tests in one process, as a debugger needs them
#   LSTM_EXT_CUDA=0 make test              the build's own switches: see docs/development.md
#   make gpu PYTHON=python3 OUT=results    with that Python as it is, and nothing installed

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
JOBS   ?= 2
OUT    ?= gpu-results

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Quoted lists of one line of pyproject.toml: the build's requirements, the linters.
BUILD_TOOLS = $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
LINTERS     = $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)

CXX_FILES = find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
# CUDA, where there is a toolkit: for this machine's GPU; without one, for the architecture whose
# kernels matter most, to see that they compile. `pip install .` builds for all.
GPU_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | grep -E '^[0-9]+\.[0-9]+$$' | sort -u | paste -sd';')
ARCHS = LSTM_EXT_CUDA_ARCHS="$${LSTM_EXT_CUDA_ARCHS:-$(or $(GPU_ARCHS),90a)}"

# What an edit of a source needs; under a second when nothing changed.
BUILD = $(ARCHS) $(BIN)/python setup.py --quiet build_ext --inplace

.DEFAULT_GOAL := help
.PHONY: help build test demo bench gpu toolkit lint format wheel clean distclean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that no later install resolves the package's range to another version.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) install $(TORCH)
	touch $@

# One stamp an extra of pyproject.toml, older than any change there.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet $(BUILD_TOOLS)
	$(ARCHS) $(PIP) install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

# nvcc for the build, on a machine that has an NVIDIA driver and no CUDA toolkit.
toolkit: $(VENV)/.torch
	$(BIN)/python tools/toolkit.py

$(VENV)/.extra-demo: | toolkit

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(LINTERS)
	touch $@

build: $(VENV)/.extra-test  ## the package, editable, in the virtual environment
	$(BUILD)

test: $(VENV)/.extra-test  ## the test suite
	$(BUILD)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

demo: toolkit $(VENV)/.extra-demo  ## a character language model, beside nn.LSTM
	$(BUILD)
	$(BIN)/python examples/char_lm.py $(ARGS)

bench: $(VENV)/.extra-bench  ## the CPU's speed beside nn.LSTM, and a report; ARGS="--help": the rest
	$(BUILD)
	$(BIN)/python -m bench $(or $(ARGS),publish)

# A Python that was named is taken as it is; $(VENV) is neither made nor used then.
ifeq ($(origin PYTHON),file)
gpu: toolkit $(VENV)/.extra-test
gpu: GPU_PYTHON = $(BIN)/python
else
gpu: GPU_PYTHON = $(PYTHON)
endif
gpu:  ## build, tests, sanitizers and benchmarks on a GPU; OUT=folder, ARGS="--help"
	$(GPU_PYTHON) tools/gpu.py --out "$(OUT)" $(ARGS)

lint: $(VENV)/.lint  ## check style and format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## bring everything into the format that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs $(BIN)/clang-format -i

wheel: | $(BIN)/python  ## a wheel in dist/, built in isolation
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:  ## remove what the build made
	rm -rf build dist *.egg-info lstm_ext/_C*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## and the virtual environment
	rm -rf $(VENV)
