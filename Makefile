# Every target makes what it needs: `make demo` on a fresh clone is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A stamp is newer than what it was made from, so a second call installs nothing.
CORE   := $(VENV)/.evolora-core
DEV    := $(VENV)/.evolora-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench-quick lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev,peft,data]"
	@touch $@ $(CORE)

demo: $(CORE)  ## learn the embedded images and pairs offline; prints the tables, writes the report
	$(BIN)/evolora demo

# One thread per worker: two workers with two threads each fight over two cores.
test: $(DEV)  ## the default suite (slow tests left out)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(DEV)  ## only the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

bench-quick: $(DEV)  ## every bench at small sizes, in two minutes; fails on a ratio 25 % off its goal
	OMP_NUM_THREADS=1 $(BIN)/evolora bench all --quick --check

lint: $(DEV)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and builds; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
