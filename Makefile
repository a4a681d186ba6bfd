# Everything a checkout needs. Each target makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two workers with a thread each suit two cores; tests measure nothing.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Libraries are compiled once, not in every process that imports them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv demo test test-slow lint bench docs package clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/diffa demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(READY)
	$(BIN)/python benchmarks/decode.py

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

package: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
