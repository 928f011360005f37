# Two commands for a newcomer: `make search` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Real data for the journeys, where it stands beside the checkout; without it they are skipped, by name.
BITFRONT_DATA ?= $(abspath $(wildcard ../shared/data))
TEST_ENV := OMP_NUM_THREADS=1 $(if $(BITFRONT_DATA),BITFRONT_DATA=$(BITFRONT_DATA))
BENCH_ENV := $(if $(BITFRONT_DATA),BITFRONT_DATA=$(BITFRONT_DATA))

.PHONY: install search test lint format docs site bench clean

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

search: install
	$(BIN)/bitfront search

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist worksteal

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What stands in docs/ and is made: the configuration reference, the outputs and pictures of the tutorial.
docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/record.py

# The pages in docs/ as a site that works offline: open site/index.html.
site: $(VENV)/installed-dev
	$(BIN)/sphinx-build --builder html --conf-dir docs --doctree-dir build/doctrees --fail-on-warning --keep-going --quiet . site

# Takes some twenty minutes, and wants a quiet machine.
BENCHES := trial_cost roofline scaling overhead samplers population joint strategies

bench: $(VENV)/installed-dev
	set -e; $(foreach name,$(BENCHES),$(BENCH_ENV) $(BIN)/python bench/$(name).py --json bench/results/$(name).json;) :
	$(BIN)/python bench/plots.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
