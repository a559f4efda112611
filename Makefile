# Everything runs in .venv, which the first target that needs it makes from nothing but Python 3.11 and a network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint types contracts unit micro clean

# One prompt through the engine in this process, on the model that ships with Baton.
demo: $(STAMP)
	$(BIN)/baton generate --local "def read_json(" --max-tokens 120 --seed 1

# All checks, in the order in which they fail fastest.
test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2

# The engine's figures beside transformers, measured now; a quarter of an hour.
micro: $(STAMP)
	$(BIN)/python -m loadtest micro engine --check

# The constraint pins the torch that the tests know. Where pip's index has CPU builds of it, nothing of CUDA is installed.
$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build ./*.egg-info
