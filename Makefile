# make demo, make test, make check: each installs what is missing into .venv first
PYTHON ?= python3
BIN = .venv/bin
LAX = arg-type assignment dict-item import-not-found misc return-value union-attr var-annotated
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test coverage lint types docs dist check clean
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps --require-hashes -r requirements-demo.txt
	touch $@

demo: install  ## a real model, by the stock recipe and by fit, in and out of domain, in three minutes on 2 cores
	$(BIN)/python examples/demo/run.py

test: install  ## the whole suite: two processes, one thread each (two threads each would fight for the cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

coverage: install  ## the same with line and branch coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov=steadytune --cov-branch --cov-report=term-missing:skip-covered

lint: install  ## style, and the layers that imports keep to
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: install  ## the library in full; of the benchmarks, that what they call is still there and takes what they give
	$(BIN)/mypy
	$(BIN)/mypy benchmarks --allow-untyped-defs $(addprefix --disable-error-code ,$(LAX))

docs: install  ## the site: the same Markdown and an API reference; every warning is an error
	$(BIN)/properdocs build

dist: install  ## wheel and sdist, and what the package index would say to them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

check: lint types docs test

clean:
	rm -rf .venv demo-out site dist
