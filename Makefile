# `make demo` and `make test` do everything on a fresh machine that has make and Python 3.11 or newer (on Debian:
# make, python3, python3-venv). `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# The newest tested Python first; `make PYTHON=/path/to/python3 venv` overrides.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3 python3.13 python3.14

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
MUTATION_STAMP := $(VENV)/.installed-mutation
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install -q -c constraints.txt

# The packages that type checks and import contracts cover; one counts from the moment it exists.
comma := ,
space := $(subst ,, )
PACKAGES := $(wildcard qmoecodec gpu/qmoecodec_gpu tools/qmoe_gptq tools/qmoe_switch)
ROOT_PACKAGES = $(subst $(space),$(comma),$(patsubst %,"%",$(notdir $(PACKAGES))))
CONFORMANCE := $(wildcard conformance/run.py)
C_ADAPTER := conformance/adapters/c
WHEEL_SITE := build/wheel-site

.PHONY: help venv demo test lint types layers unit check check-long test-wheel bench bench-gpu conformance conformance-c \
        docs wheel mutation clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | sort | awk -F'\t' '{ printf "  %-15s %s\n", $$1, $$2 }'

venv: $(STAMP)  ## create .venv and install; again only when pyproject.toml or constraints.txt changed

# torch first: its wheel is the large one, and everything else is resolved round it. The package itself is built
# without isolation, with the build tools that constraints.txt pins.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	    for python in $(or $(PYTHON),$(PYTHONS)); do \
	        if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            echo "creating $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); break; \
	        fi; \
	    done; \
	fi
	@[ -x $(BIN)/python ] || { echo "no Python >= 3.11 with the venv module found (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PIP) torch==2.13.0
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation -e '.[torch,hf,dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

$(MUTATION_STAMP): $(STAMP)
	$(PIP) cosmic-ray==8.7.0
	@touch $@

demo: $(STAMP)  ## store the example model, and quantize, evaluate and run it from the compressed form
	@$(BIN)/python examples/demo.py

test: lint types layers unit $(if $(CONFORMANCE),conformance $(if $(shell command -v cc),conformance-c))  ## everything a change must pass

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy --strict $(PACKAGES)

layers: $(STAMP)  ## who may import whom
	@mkdir -p build
	@sed 's|^root_packages = .*|root_packages = [$(ROOT_PACKAGES)]|' pyproject.toml > build/importlinter.toml
	PYTHONPATH=.:gpu:tools $(BIN)/lint-imports --config build/importlinter.toml

unit: $(STAMP)  ## pytest without the long tests
	$(BIN)/python -m pytest

check: test docs test-wheel  ## test, the docs build, and the tests against the built wheel

check-long: $(STAMP)  ## the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m long --timeout 3600

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

# -P keeps the working directory off the path; the wheel stands before the editable install on it.
test-wheel: $(STAMP)  ## run the tests against the built wheel
	rm -rf build/wheel $(WHEEL_SITE)
	$(BIN)/python -m hatchling build -t wheel -d build/wheel
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q --no-deps --no-index --target $(WHEEL_SITE) build/wheel/*.whl
	PYTHONPATH=$(CURDIR)/$(WHEEL_SITE) QMOECODEC_TEST_INSTALL=$(CURDIR)/$(WHEEL_SITE) $(BIN)/python -P -m pytest tests

bench: $(STAMP)  ## speed of the codec on the CPU, sizes, and peak memory
	@$(BIN)/python tools/bench/codec.py
	@$(BIN)/python tools/bench/rates.py
	@$(BIN)/python tools/bench/memory.py

bench-gpu: $(STAMP)  ## speed of the kernels on the GPU, of a model of 1.6 trillion parameters, and of the runtime
	@$(BIN)/python tools/bench/gpu.py
	@$(BIN)/python tools/bench/headline.py
	@$(BIN)/python tools/bench/runtime_gpu.py

conformance: $(STAMP)  ## the conformance vectors against the Python codec
	$(BIN)/python conformance/run.py

conformance-c: $(STAMP)  ## the conformance vectors against the C decoder
	$(MAKE) -C $(C_ADAPTER)
	$(BIN)/python conformance/run.py --adapter c

mutation: $(MUTATION_STAMP)  ## change the decoder and the validator, and see whether the tests notice (hours)
	$(BIN)/python tests/mutation/run.py

docs: $(DOCS_STAMP)  ## the documentation, warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs docs/_build/html

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) build dist docs/_build docs/spec .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
