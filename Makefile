# `make demo` and `make test` do everything on a fresh machine; both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint benchmark setup clean

demo: setup
	$(BIN)/python examples/hyper_cleaning.py

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The second needs Debian's package dataset-fashion-mnist.
benchmark: setup
	$(BIN)/python benchmarks/hypergradient.py --output benchmarks/results/hypergradient.md
	$(BIN)/python benchmarks/trajectory.py --output benchmarks/results

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv tune_implicit_results .pytest_cache .ruff_cache .mypy_cache
