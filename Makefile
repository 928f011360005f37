# Two commands for a newcomer: `make search` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Real data for the journeys, where it stands beside the checkout; without it they are skipped, by name.
BITFRONT_DATA ?= $(abspath $(wildcard ../shared/data))
TEST_ENV := OMP_NUM_THREADS=1 $(if $(BITFRONT_DATA),BITFRONT_DATA=$(BITFRONT_DATA))
BENCH_ENV := $(if $(BITFRONT_DATA),BITFRONT_DATA=$(BITFRONT_DATA))

.PHONY: install search test all quick fuzz golden lint format docs site dist bench big rivals clean

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

PYTEST := $(BIN)/pytest -n 2 --dist worksteal

test: lint
	$(TEST_ENV) $(PYTEST)

# For the minute before a commit: without what trains, draws, or starts processes or a browser; and one journey.
quick: lint
	$(TEST_ENV) BITFRONT_PROPERTIES=quick $(PYTEST) -m "not slow or quick"

# What takes long too, and all examples of the property tests: half an hour or more.
all: lint
	$(TEST_ENV) BITFRONT_ALL=1 BITFRONT_PROPERTIES=all $(PYTEST)

# The property tests with examples of other seeds, for so many minutes; SEED=... draws those of a failure again.
MINUTES ?= 10
# Then so many kills of searches and their workers.
KILLS ?= 40

fuzz: $(VENV)/installed-dev
	$(TEST_ENV) $(BIN)/python tests/fuzz.py --seconds $$(($(MINUTES) * 60)) $(if $(SEED),--seed $(SEED)) -- -n 2 --dist worksteal
	$(TEST_ENV) BITFRONT_KILLS=$(KILLS) $(BIN)/pytest tests/journeys/test_journey_kills.py

# What small searches give with the source of another revision, and with that of this folder: every digit.
BASE ?= HEAD
GOLDEN := $(CURDIR)/build/golden

golden: $(VENV)/installed-dev
	rm -rf $(GOLDEN)
	mkdir -p $(GOLDEN)/base
	git archive $(BASE) src | tar -x -C $(GOLDEN)/base
	PYTHONPATH=$(GOLDEN)/base/src $(BIN)/python tests/golden/runs.py $(GOLDEN)/before
	PYTHONPATH=$(CURDIR)/src $(BIN)/python tests/golden/runs.py $(GOLDEN)/after --against $(GOLDEN)/before

# A source distribution, and the wheel that is built from it.
dist: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

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
BENCHES := trial_cost formats calibration learned_bits granularity int8 runtime roofline zoo deploy scaling cluster overhead samplers population joint networks fpga microcontroller strategies

bench: $(VENV)/installed-dev
	set -e; $(foreach name,$(BENCHES),$(BENCH_ENV) $(BIN)/python bench/$(name).py --json bench/results/$(name).json;) :
	$(BIN)/python bench/plots.py

# Networks of tens of millions of parameters, within a limit of memory: a quarter of an hour, and 8 GB.
big: $(VENV)/installed-dev
	$(BIN)/python bench/big.py --json bench/results/big.json
	$(BIN)/python bench/plots.py

# Learned bits beside the packages that do the same, each trained in an environment of its own with one thread: half an
# hour each, and the network once. What does not install is said, and left out.
rivals: $(VENV)/installed-dev
	-$(BIN)/python bench/rivals/install.py
	$(BENCH_ENV) $(BIN)/python bench/rivals/recount.py --recipe quick --recipe thorough --json bench/results/rivals.json
	$(BENCH_ENV) $(BIN)/python bench/rivals/luts.py --json bench/results/luts.json
	$(BIN)/python bench/plots.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
