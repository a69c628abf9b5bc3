# `make demo` and `make test` do everything on a fresh machine; both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
NUMERICAL := tests/hypergradients tests/trials tests/checks

.PHONY: demo test test-kernels test-oldest lint benchmark bench-defaults bench-search bench-kill setup clean

demo: setup
	$(BIN)/python examples/hyper_cleaning.py

test: setup
	$(BIN)/python -m pytest

# As on other processors, whose kernels add numbers up in another order. On an AMD processor MKL heeds MKL_CBWR alone.
test-kernels: setup
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -q $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(BIN)/python -m pytest -q $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 $(BIN)/python -m pytest -q $(NUMERICAL)

# With the oldest versions promised. What those warn of is no error.
test-oldest: .venv-oldest/installed
	$(OLDEST)/python -m pytest -q -o filterwarnings=ignore \
		tests/searches tests/test_cli.py tests/test_examples.py tests/hypergradients/test_borrowed.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The benchmarks but `hypergradient.py`, `loop.py` and `statuses.py` need Debian's package dataset-fashion-mnist.
benchmark: setup
	$(BIN)/python benchmarks/hypergradient.py --output benchmarks/results/hypergradient.md
	$(BIN)/python benchmarks/loop.py --output benchmarks/results/loop.md
	$(BIN)/python benchmarks/statuses.py --output benchmarks/results/statuses.md
	$(BIN)/python benchmarks/trajectory.py --output benchmarks/results

# An hour on one core.
bench-defaults: setup
	$(BIN)/python benchmarks/defaults.py --output benchmarks/results

# Seven hours on one core; `--rivals 2` takes three.
bench-search: setup
	$(BIN)/python benchmarks/search.py --output benchmarks/results

# Ten minutes for Optuna, half an hour for Ray.
bench-kill: setup
	PYTHONPATH=. $(BIN)/python benchmarks/kill.py --output benchmarks/results/kill.md
	PYTHONPATH=. $(BIN)/python benchmarks/overhead.py --output benchmarks/results/overhead.md

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(call install,constraints.txt,dev)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(call install,constraints-oldest.txt,test)

# Torch on its own first, so that pip takes the CPU build where one is at hand.
define install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $(1) torch
	$(@D)/bin/python -m pip install --quiet --constraint $(1) --editable ".[$(2)]"
	touch $@
endef

clean:
	rm -rf .venv .venv-oldest tune_implicit_results .pytest_cache .ruff_cache .mypy_cache
