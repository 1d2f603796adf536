# Every target sets up what it needs first (launch/setup.sh); later runs skip what is done.
# On the command line: PYTHON=/path/to/python3.11, FFCV=no, SLURM=no, BROWSER=no, PYTEST_ARGS="-k lars".
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-processors bench docs lint clean
BIN := .venv/bin
PYTEST_ARGS ?=
BENCHMARKS ?= $(filter-out $(if $(wildcard /dev/nvidia0),,benchmarks/gpu.py), \
	$(wildcard benchmarks/[a-z]*.py))
# Sets of oneDNN's and ATen's kernels: those of lesser processors than this one, and its own.
KERNELS := ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=DEFAULT
SHELL_SCRIPTS := .ci/run launch/setup.sh $(wildcard slurm/*.sh)
export PYTHON FFCV SLURM BROWSER
without_slurm := $(if $(filter no,$(SLURM)), and not slurm)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## install everything that running needs: .venv, and system packages for FFCV
	@launch/setup.sh base

demo: setup  ## pack, pretrain on 2 processes, evaluate and export a small data set: minutes
	@$(BIN)/python -m launch.demo

lint: setup  ## formatting, style, types; shell scripts too where shellcheck is installed
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(if $(shell command -v shellcheck),shellcheck $(SHELL_SCRIPTS))

test: lint  ## lint, then every test that takes seconds and needs no peer: 15 to 20 minutes
	@launch/setup.sh slurm
	$(BIN)/python -m pytest --ignore=tests/peers -m "not slow$(without_slurm)" $(PYTEST_ARGS)

test-all: lint  ## lint, then every test: an hour and a half
	@launch/setup.sh bench docs browser slurm
	$(BIN)/python -m pytest --reliability=docs/reliability.md \
		$(if $(without_slurm),-m "not slurm") $(PYTEST_ARGS)

test-processors: setup  ## the tests whose numbers hang on the processor, with four sets of kernels
	@for kernels in $(KERNELS); do echo "== $$kernels"; \
		env $$kernels $(BIN)/python -m pytest --ignore=tests/peers \
			-m "processors and not slow" $(PYTEST_ARGS) || exit 1; done

bench: setup  ## measure us beside our peers
	@launch/setup.sh bench
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python "$$benchmark" || exit 1; done

docs: setup  ## build docs/ as pages that open without network: docs/_build/html/index.html
	@launch/setup.sh docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	@echo docs/_build/html/index.html

clean:  ## remove .venv, caches, built pages and the demo's output; runs/ stays
	@[ ! -e $(BIN) ] || slurm/local_cluster.sh down
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis demo *.egg-info docs/_build docs/reference
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
