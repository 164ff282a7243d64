# Needs python3 (3.11 or newer, with venv) and make. `make` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# MLServer, a KServe v2 server that tests ask; it wants other versions of what we use.
KSERVE := .venv-mlserver
KSERVE_STAMP := $(KSERVE)/.installed
# Benchmarks that `make bench` runs; each takes --quick.
BENCHMARKS ?= $(filter-out command record,$(notdir $(basename $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help install demo up test test-slow lint format bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F': *' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) $(KSERVE_STAMP)  ## Make .venv with everything in the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Dram needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[worker,embedded,s3,dev]'
	@touch $@

$(KSERVE_STAMP): tests/service/mlserver.txt
	$(PYTHON) -m venv $(KSERVE)
	$(KSERVE)/bin/python -m pip install -qq --no-compile --requirement $<
	@touch $@

demo: $(STAMP)  ## From real images to a student that classifies, through the whole service
	$(BIN)/python examples/demo.py

up: $(STAMP)  ## Start the service on this machine, until Ctrl-C
	$(BIN)/dram up

# By default xdist starts files of few tests last, which are the long ones: one core then waits for the other.
test: $(STAMP) $(KSERVE_STAMP)  ## Run the tests, but for the slow ones; two files at a time, one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## Run the slow tests only
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(STAMP)  ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Run every benchmark in its small version
	$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[benchmarks]'
	@for name in $(BENCHMARKS); do echo "== $$name" && $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean:  ## Remove the virtual environments and caches; .dram, which holds your data, stays
	rm -rf $(VENV) $(KSERVE) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
