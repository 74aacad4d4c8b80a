# Everything runs in .venv; nothing but Python (3.11 to 3.13), make and a package index is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint types contracts check test-browser fuzz docs site clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch .venv/installed

quickstart: install
	$(BIN)/posttrain recipe=quickstart

test: lint types contracts check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contracts: install
	$(BIN)/lint-imports

# A process for every core, each at 1 GB of memory; WORKERS=0 runs all tests in one, as for a debugger.
WORKERS ?= logical
check: install
	$(BIN)/pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

test-browser: install
	$(BIN)/pytest tests/browser

# Draws property tests at random for MINUTES; failing examples become fixed cases of their tests.
MINUTES ?= 30
fuzz: install
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

docs: install
	$(BIN)/python docs/hooks.py
	$(BIN)/python docs/api.py
	$(BIN)/python docs/settings.py

site: install
	$(BIN)/python docs/site.py build/site

clean:
	rm -rf .venv runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
