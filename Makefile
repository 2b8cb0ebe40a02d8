# Every target sets up what it needs: the first call makes .venv, later calls only look at its stamp.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
# Workers of the tests: as many as there are cores. ARGS='-n 0' runs them in one process, for a debugger.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# What `make quick` covers: the language and its trace, pages, oracles and worked numbers, laws on the reference engine,
# state in few bits, what a word or a mapping means, and that tests stand by themselves.
QUICK := tests/language tests/optimizers tests/oracles tests/laws tests/storage tests/training \
	tests/config/test_strategy.py tests/config/test_recipes.py tests/project/test_tests.py \
	tests/project/test_architecture.py

.PHONY: help demo quick test test-full coverage check docs bench bench-quality claims build versions clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a classifier of handwritten digits with Adan, on one CPU"
	@echo "make quick   an answer in a minute: pages, oracles, laws on the reference engine, words and mappings"
	@echo "make test    run the tests, some ten minutes on two cores (ARGS='-k adan' passes options to pytest)"
	@echo "make test-full   the tests with every case of the long cross products"
	@echo "make coverage    the tests with what they cover: a table, htmlcov/ and coverage.xml"
	@echo "make check   lint, format, and types by mypy and pyright"
	@echo "make docs    write the pages that are read off the classes, and build the site in build/site"
	@echo "make bench   step times of all optimizers on this CPU, beside other packages; an hour or more (ARGS='--budget 600')"
	@echo "make bench-quality   how faithful state in few bits is over 3000 steps"
	@echo "make claims  what papers claim, looked at on two cores in an hour and a half; goes on where it was stopped (ARGS='adan')"
	@echo "make versions    tests with the lowest and newest Python, torch and Lightning: 30 GB of downloads, an hour or more"
	@echo "make build   sdist and wheel in dist/"
	@echo "make clean   remove .venv, build, dist and caches"

# torch goes first and pinned: an open range such as torch>=2.6 would pick the newest build, gigabytes of CUDA included.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("constraints.txt is for Python 3.11 and newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev,docs,examples,test]'
	touch $@

demo: $(STAMP)
	$(BIN)/lightning-optim fit --config examples/digits/adan.yaml

quick: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not full and not engines" $(QUICK) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-full: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "" $(ARGS)

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html --cov-report=xml $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	$(BIN)/python -m docs.generate
	$(BIN)/python -m sphinx -E -W --keep-going -b html -c docs . build/site

# Other packages are installed for the benchmarks alone.
$(VENV)/.peers: $(STAMP)
	$(PIP) --no-build-isolation --editable '.[bench]'
	touch $@

bench: $(VENV)/.peers
	$(BIN)/python -m benchmarks.cpu --page $(ARGS)

bench-quality: $(VENV)/.peers
	$(BIN)/python benchmarks/state_quality.py

claims: $(STAMP)
	$(BIN)/python -m benchmarks.claims $(ARGS)

build: $(STAMP)
	$(BIN)/python -m build --no-isolation

versions: $(STAMP)
	$(BIN)/python tools/versions.py $(ARGS)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist .coverage* coverage.xml htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
