# Everything runs in .venv; nothing but Python (3.11 to 3.13), make and a package index is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-test quickstart test lint types contracts check test-browser fuzz docs site clean

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The package alone; the tests ask for its extras, too.
install: .venv/installed
install-test: .venv/installed-test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch .venv/installed

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch .venv/installed-test

quickstart: install
	$(BIN)/posttrain recipe=quickstart

test: lint types contracts check

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/mypy

contracts: install-test
	$(BIN)/lint-imports

# A process for every core, each at 1 GB of memory; WORKERS=0 runs all tests in one, as for a debugger.
WORKERS ?= logical
check: install-test
	$(BIN)/pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

test-browser: install-test
	$(BIN)/pytest tests/browser

# Draws property tests at random for MINUTES; failing examples become fixed cases of their tests.
MINUTES ?= 30
fuzz: install-test
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

docs: install-test
	$(BIN)/python docs/hooks.py
	$(BIN)/python docs/api.py
	$(BIN)/python docs/settings.py

site: install-test
	$(BIN)/python docs/site.py build/site

clean:
	rm -rf .venv runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
