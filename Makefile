# Two commands for a newcomer: `make quickstart` trains a model one can look at, `make test` proves it.
# One for every change: `make fast` leaves out the tests that start processes or are slow.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart fast test lint reference clean

quickstart: $(VENV)/installed
	$(BIN)/sightline run jobs/recipes/quickstart.yaml

fast: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest --fast --numprocesses 2

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest --numprocesses 3

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

reference: $(VENV)/installed
	$(BIN)/python -c 'from pipeline.reference import page; print(page(), end="")' > docs/recipe.md

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
