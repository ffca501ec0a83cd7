# make setup | demo | test | bench | gpu-check | lint | protos | clean
#
# PYTHON       the interpreter that .venv is made with; 3.11 or newer
# TORCH_INDEX  a package index for PyTorch alone, e.g. the one of its CPU builds; empty: where pip looks anyway
# GPU_PYTHON   the interpreter of `make gpu-check`, which installs nothing
# RESULTS      where `make bench` writes its rows; benchmarks/results for those that the documentation quotes

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell python3.11 -c pass 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
RESULTS ?= .benchmarks

# Our folder `kernels` would hide another project's package of that name from `python -m`.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
READY := .venv/ready
# A virtual environment holds absolute paths, so the stamp remembers where it was made.
MADE_AT := $(shell cat $(READY) 2>/dev/null)

.PHONY: help setup demo test bench gpu-check lint protos clean FORCE

help:
	@sed -n '1,6s/^#[ ]\{0,1\}//p' Makefile

setup: $(READY)

ifneq ($(MADE_AT),$(CURDIR))
$(READY): FORCE
CLEAR := $(if $(MADE_AT),--clear)
endif

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "reelstep needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Try: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(CLEAR) .venv
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@printf %s '$(CURDIR)' > $@

demo: setup
	$(BIN)/python -m reelstep.benchmarks.demo

test: lint
	$(BIN)/pytest -m "not gpu and not slow"

bench: setup
	@mkdir -p $(RESULTS)
	set -e; for name in $$($(BIN)/reelstep bench | awk '$$1 != "gpu_check" { print $$1 }'); do $(BIN)/reelstep bench $$name --json $(RESULTS)/$$name.json; done

# Without `setup`: the checkout is found through a link, as by mypy below. Exit code 2 says that there is no GPU.
gpu-check:
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/reelstep
	PYTHONPATH=.cache/types $(GPU_PYTHON) -P -m reelstep.benchmarks.gpu_check --json benchmarks/results/gpu_check.json

# mypy finds the package by its folder's name, and a checkout may be called anything: so it looks through a link.
lint: setup
	$(BIN)/ruff check
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/reelstep
	set -o pipefail; MYPYPATH=.cache/types $(BIN)/mypy --cache-dir .cache/mypy | sed 's|^\.cache/types/reelstep/||'
	$(BIN)/lint-imports

# In an environment of its own: the generator wants an older protobuf than the one we run and test with.
protos:
	$(PYTHON) -m venv .cache/protoc
	.cache/protoc/bin/python -m pip install -q "$$(sed -n 's/^protos = \["\(.*\)"\]$$/\1/p' pyproject.toml)" googleapis-common-protos
	.cache/protoc/bin/python -m pip install -q --no-deps -e .
	.cache/protoc/bin/python -m reelstep.protos.generate

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .benchmarks build dist demo ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
