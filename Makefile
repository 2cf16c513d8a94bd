# Every target is one plain command in the environment that `make venv` makes.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: venv demo test test-long package release-check versions neighbours claims lint docs format clean

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

# Everything that CI checks: lint, types, tests, documentation, the built wheel.
test: venv lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"
	$(MAKE) docs package

# Every member of every matrix, and the coverage, which makes tests half as slow again.
test-long: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

# The built wheel, not the checkout, passes the quick tests.
WHEEL_TESTS = test_average candidates/test_store phases/test_plan phases/test_report phases/test_cycles
package: venv
	rm -rf build/package
	$(BIN)/python -m hatchling build -d build/package/dist
	$(BIN)/python -m pip install --quiet --no-deps --target build/package/site build/package/dist/*.whl
	cp -r tests examples docs README.md CONTRIBUTING.md pyproject.toml build/package
	cd build/package && PYTHONPATH=site $(abspath $(BIN))/python -c \
		"import lightning_twa; assert 'build/package/site' in lightning_twa.__file__"
	cd build/package && PYTHONPATH=site $(abspath $(BIN))/python -m pytest -q --durations=1 \
		$(WHEEL_TESTS:%=tests/%.py)

# Wheel and sdist as they would be uploaded: version, metadata, contents, links. Uploads nothing.
release-check: venv
	rm -rf build/release
	$(PYTHON) -m venv build/release/env
	build/release/env/bin/python -m pip install --quiet twine
	$(BIN)/python .ci/release_check.py build/release/dist
	build/release/env/bin/python -m twine check --strict build/release/dist/*

# The quick tests with the lowest and the newest torch and Lightning that pyproject.toml allows, each in
# an environment of its own; with CUDA builds of torch some 10 GB. ENVIRONMENTS puts them elsewhere.
ENVIRONMENTS ?= build/versions
versions: venv
	$(BIN)/python .ci/versions.py lowest $(ENVIRONMENTS)/lowest
	$(BIN)/python .ci/versions.py highest $(ENVIRONMENTS)/highest

# Short runs with the callback in other projects that train with Lightning, each with its newest
# release in an environment of its own; some 10 GB.
neighbours: venv
	$(BIN)/python examples/neighbours/run.py build/neighbours

# The tables of docs/benchmarks.md about the paper's claims; at most about 40 minutes on 2 cores.
# What the budgets, in minutes, left out the next call makes.
FASHION ?=
claims: venv
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/claims.py --out results --budget 30 \
		$(if $(FASHION),--fashion $(FASHION))
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/claims.py --out results --budget 8 \
		--study --seeds 3
	cp results/claims.md results/study.md docs/_results

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: venv
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build docs/_build .pytest_cache .mypy_cache .ruff_cache .coverage
