# Each target does all its set-up: a virtual environment in .venv, made anew when pyproject.toml changes.
VENV := .venv
BIN := $(VENV)/bin

# What the demo trains on: make demo RECIPE=folder DATA=path/to/images
RECIPE ?= digits
DATA ?= digits

.PHONY: help demo test lint bench docs clean

help:
	@echo "make demo   train and evaluate on the handwritten digits that are included"
	@echo "make test   the test suite"
	@echo "make lint   formatting, lint rules, types"
	@echo "make docs   the documentation, into site/"
	@echo "make bench  measurements, as tables"

PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

$(VENV)/.dependencies: pyproject.toml
	rm -rf $(VENV)
	python3 -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.ready

$(VENV)/.ready: $(VENV)/.dependencies CMakeLists.txt $(wildcard src/epsanet/kernels/native/*)
	$(PIP) --no-deps --force-reinstall --editable .
	touch $@

demo: $(VENV)/.ready
	rm -rf runs/demo
	$(BIN)/epsanet train $(RECIPE) --data $(DATA) --output runs/demo
	$(BIN)/epsanet evaluate runs/demo/model --data $(DATA)

# A process a core, with one thread each: most tests are too small to use two. They take the groups of files of
# tests/conftest.py in turn. A worker that dies is not replaced: pytest-xdist would then wait for its files for ever.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.ready
	$(PIP) --editable '.[deploy]'
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) build dist site runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
