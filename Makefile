# Everything from a fresh clone: `make demo` sets up and runs the demonstration sweep, `make test` sets up and tests.
# Needs Python 3.11 or newer and make; everything else goes into .venv.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
BIN := $(VENV)/bin
# Extra words for `pip install`, for instance an index that has CPU builds of PyTorch.
PIP_ARGS ?=
# Extra words for pytest, for instance `make test PYTEST_ARGS="-k data -x"`.
PYTEST_ARGS ?=
# Extra words for the chaos runs, for instance `make chaos CHAOS_ARGS="--seed 7"`.
CHAOS_ARGS ?=
# Which benchmarks `make bench` runs; empty: all.
BENCH ?=
# The interpreter that makes .venv; the first of these that is new enough unless you name one (make PYTHON=... demo).
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

DEMO := results/demo
QUESTION := SELECT method, T, round(avg(reliability_exact), 3) AS reliability, \
	round(avg(generalization_exact), 3) AS generalization, round(avg(locality_token), 3) AS locality, \
	round(avg(edit_seconds), 3) AS seconds_per_edit \
	FROM edits WHERE scored = 'final' GROUP BY ALL ORDER BY method, T

# pip's own output is long and its quiet mode says nothing for minutes: show one word per package.
PROGRESS := awk '/^Collecting/ { printf "      %s\n", $$2; fflush() } /^Installing collected/ { print "      unpacking ..."; fflush() }'
INSTALL = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# Tests sync thousands of small files: in memory that takes no time, where there is room for them.
MEMORY := /dev/shm
ROOMY := $(shell [ -w $(MEMORY) ] && df -k $(MEMORY) | awk 'NR == 2 && $$4 > 4000000 { print "yes" }')

# Two test files (or test classes, where a file has them) at a time, each with one thread: what two cores are good for.
PYTEST = $(if $(ROOMY),PYTEST_DEBUG_TEMPROOT=$(MEMORY)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: check-python
check-python:
	@if [ -z '$(PYTHON)' ] || ! '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "editsweep needs Python 3.11 or newer; found: $$('$(or $(PYTHON),python3)' --version 2>&1 || echo none)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 demo" >&2; \
		exit 1; \
	fi

$(BIN)/python:
	@$(MAKE) --no-print-directory check-python
	@echo "==> Making $(VENV) with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv $(VENV)

# Stamps: set-up is done once, and again when what it installs has changed.
$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing editsweep and its libraries into $(VENV) (PyTorch and Ray are large: the first time takes minutes)"
	@$(INSTALL) -e . | $(PROGRESS)
	@touch $@

$(VENV)/.ready-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing editsweep, its libraries and the test tools into $(VENV) (the first time takes minutes)"
	@$(INSTALL) -e '.[test,plots]' | $(PROGRESS)
	@touch $(VENV)/.ready $@

.PHONY: setup
setup: $(VENV)/.ready ## Make .venv and install editsweep

.PHONY: demo
demo: $(VENV)/.ready ## Run the demonstration sweep on this machine and ask it a question
	@echo "==> Running sweeps/demo.yaml into $(DEMO) (stop it and run it again: it continues)"
	@$(BIN)/editsweep run sweeps/demo.yaml --results $(DEMO)
	@echo
	@echo "==> editsweep query $(DEMO) \"$(QUESTION)\""
	@$(BIN)/editsweep query $(DEMO) "$(QUESTION)"

.PHONY: test
test: $(VENV)/.ready-test ## Run the tests (minutes)
	@echo "==> Tests"
	@$(PYTEST) -m "not slow and not long and not gpu" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.ready-test ## Run the slow tests: Ray, crashes, long sequences
	@echo "==> Slow tests"
	@$(PYTEST) -m "slow and not long and not gpu" $(PYTEST_ARGS)

# The instruction set with which numbers are compared a second time: avx2, or default for none beyond SSE.
NUMERIC_ISA ?= avx2
ONEDNN_avx2 := AVX2
ONEDNN_default := SSE41

# Products come from oneDNN, from PyTorch and from MKL, and each has a variable of its own. MKL_CBWR holds on every processor
# (MKL_ENABLE_INSTRUCTIONS on Intel's alone).
.PHONY: test-numeric
test-numeric: $(VENV)/.ready-test ## Run the tests that compare numbers as on an older processor (minutes)
	@echo "==> Numeric tests as on an older processor ($(NUMERIC_ISA))"
	@ONEDNN_MAX_CPU_ISA=$(ONEDNN_$(NUMERIC_ISA)) ATEN_CPU_CAPABILITY=$(NUMERIC_ISA) MKL_CBWR=COMPATIBLE \
		$(PYTEST) -m "numeric and not slow and not long and not gpu" $(PYTEST_ARGS)

.PHONY: test-long
test-long: $(VENV)/.ready-test ## Run parity tests on many rounded copies and with many seeds (minutes, not part of CI)
	@echo "==> Long tests"
	@$(PYTEST) -m "long and not gpu" $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: $(VENV)/.ready-test ## Run the tests that need a CUDA device
	@echo "==> GPU tests"
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

.PHONY: chaos
chaos: $(VENV)/.ready-test ## Kill, pause, remove and damage things in mid-sweep and compare the tables (about 20 minutes)
	@$(BIN)/python -m tests.chaos.run $(CHAOS_ARGS)

.PHONY: chaos-short
chaos-short: $(VENV)/.ready-test ## The same with a few faults of each kind (about 2 minutes)
	@$(BIN)/python -m tests.chaos.run --short $(CHAOS_ARGS)

.PHONY: bench
bench: $(VENV)/.ready ## Measure speed against its targets (about 20 minutes; BENCH="table plan" runs these)
	@$(BIN)/python benchmarks/run.py $(BENCH)

.PHONY: lint
lint: $(VENV)/.ready-test ## Style, types, and who may import whom
	@echo "==> ruff check" && $(BIN)/ruff check .
	@echo "==> ruff format --check" && $(BIN)/ruff format --check --quiet .
	@echo "==> mypy" && $(BIN)/mypy
	@echo "==> lint-imports" && $(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.ready-test ## Mend what ruff can mend
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
