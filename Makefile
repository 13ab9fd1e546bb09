# Everything a newcomer needs: `make demo` and `make test` set up their own environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test soak test-lowest lint bench bench-peers
help: ; @grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

setup: .venv/ready ## a virtual environment with the pinned dependencies
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## cache, train, evaluate, browse and steer on the bundled model, offline
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo.py

test: setup ## the tests, ten minutes at most on two cores
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

soak: setup ## longer tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak --timeout 3600

test-lowest: ## the tests against the lower bounds of the dependencies
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest

lint: setup ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## time of a training step against the encoder product and eager autograd
	$(BIN)/python benchmarks/objective.py

bench-peers: .peers/ready ## an environment of its own for the alternatives that benchmarks/ measures against
.peers/ready: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet torch==2.13.0
	.peers/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
	touch $@
