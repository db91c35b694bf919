PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXTRAS ?= dev,hf

.PHONY: train test test-slow check lint types format docs notebooks clean

# The main job: learn a small policy and compare it on held-out tasks, in about ten minutes on two cores.
train: $(READY)
	$(BIN)/rlkd train --config default $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Tests that take long, and those that kill, damage and fill: CI runs them, too.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

check: lint types test test-slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

# The site, in site/; a broken link is an error.
docs: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# The tutorials, executed anew from the Python files beside them.
notebooks: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/tutorials/build.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \"rlkd needs Python 3.10 or newer: make PYTHON=python3.11\")"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $(READY)

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
