# Short cuts. Each works in a fresh clone and installs only what changed; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint bench browser docs release
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.spar-demo  ## install, then segment a shipped picture with the shipped checkpoint
	$(BIN)/spar segment src/spar_hf/assets/pictures/demo.png \
		--labels "cake; car, automobile; tree; apple; star; sea; sky; sand" --output demo-output

test: $(VENV)/.spar-dev  ## install, then run the tests (PYTEST_ARGS adds options)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.spar-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.spar-dev  ## measure speed and memory on this machine
	$(BIN)/python benchmarks/speed.py

browser: $(VENV)/.spar-dev  ## build the page that runs in the browser, dist/browser (needs npm)
	$(BIN)/python spaces/browser/build.py

docs: $(VENV)/.spar-docs  ## build the documentation as a site, dist/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

release: $(VENV)/.spar-dev  ## build sdist and wheel into dist and check them (PYTHONS names the Pythons to try)
	$(BIN)/python .ci/release.py $(PYTHONS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is older than what it was installed from exactly when there is something to install.
$(VENV)/.spar-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing spar-hf into $(VENV); the first time takes a few minutes."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.spar-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing spar-hf with its development tools into $(VENV); the first time takes a few minutes."
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.spar-demo $(VENV)/.spar-docs

$(VENV)/.spar-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	@touch $@ $(VENV)/.spar-demo
