# make demo: install into .venv and train the embedded default.   make test: install and run the quick tests.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo lint test test-marked test-all clean
.DEFAULT_GOAL := demo

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	touch $@

demo: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no mtl_dist/train.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PYTEST) -m "not slow and not deepspeed and not slurm"

test-marked: .venv/installed
	$(PYTEST) -m "slow or deepspeed or slurm"

test-all: lint  # at once, so that libraries are imported and fixtures made once
	$(PYTEST)

clean:
	rm -rf .venv build dist *.egg-info
