# Every target is one plain command in the environment that `make venv` makes.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: venv demo test lint docs format clean

venv: $(STAMP)

# torch first and pinned: the other packages would pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# The digits comparison with 2 seeds instead of 5; about a minute on 2 cores.
demo: venv
	$(BIN)/python examples/digits.py --seeds 2

# Everything that CI checks: lint, types, tests with coverage, documentation.
test: venv lint
	$(BIN)/python -m pytest --cov --cov-report=term
	$(MAKE) docs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: venv
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .coverage
