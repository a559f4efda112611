# Everything runs in .venv, which the first target that needs it makes from nothing but Python 3.11 and a network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint types contracts unit faults chaos protos micro compile-kernels gpu clean

# A whole mesh on the model that ships with Baton, a few prompts that share a prefix, a timeline of each; then everything stops.
demo: $(STAMP)
	$(BIN)/baton demo

# All checks, in the order in which they fail fastest.
test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

# The faults have the machine for themselves: they look at how long a frozen worker goes unnoticed.
unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --ignore tests/faults
	$(BIN)/python -m pytest -s tests/faults

# Every service × every fault × every step of a request, as a table; half an hour. `make test` runs some of the cells.
faults: $(STAMP)
	FAULTS=all $(BIN)/python -m pytest -s tests/faults/test_fault_matrix.py

# 500 cancels and deadlines, 30 kills and freezes at random moments, and MINUTES at least; SEED repeats a run.
MINUTES ?= 0
chaos: $(STAMP)
	CHAOS_SEED=$(SEED) CHAOS_FACTOR=10 CHAOS_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s tests/faults/test_randomized.py

# The stubs of protos/, made anew in place; a test compares them.
protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/baton/v1/*.proto

# The engine's figures beside transformers, measured now; a quarter of an hour.
micro: $(STAMP)
	$(BIN)/python -m loadtest micro engine --check

# Triton's kernels in all combinations that models may have, for three generations of GPUs; needs none. `make test` compiles the usual ones.
compile-kernels: $(STAMP)
	$(BIN)/python -m tests.kernels.compile_all everything

# The Triton kernels on this machine's GPU, checked and timed; uses the Python that has the GPU's torch, and nothing else.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m loadtest.micro.gpu --write kernels/H200.md

# The constraint pins the torch that the tests know. Where pip's index has CPU builds of it, nothing of CUDA is installed.
$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build ./*.egg-info
