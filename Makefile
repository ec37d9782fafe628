# `make demo` and `make test` do all the set-up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := protocols strategies client server simulations cli
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

MAKEFLAGS += --no-builtin-rules

.PHONY: help demo flower test check lint types test-slow test-deploy fuzz bench proto docs clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## Twenty unequal devices tune a language model together; five strategies side by side
	$(BIN)/fedloom run demo --out runs/demo --force

flower: $(VENV)/installed  ## The quick recipe under Flower's own simulation engine (Ray)
	PATH="$(CURDIR)/$(BIN):$$PATH" FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
	  flwr run . --stream --federation-config "num-supernodes=4 client-resources-num-cpus=1"

check: lint types  ## Lint and types

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	@mkdir -p build/types/fedloom
	@for room in $(ROOMS); do ln -sfn $(CURDIR)/$$room build/types/fedloom/$$room; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases $(addprefix -p fedloom.,$(ROOMS))

test: check  ## Lint, types and the whole fast suite
	$(BIN)/pytest -q -n 2

test-slow: $(VENV)/installed  ## What takes minutes: Flower's own engine, real data
	$(BIN)/pytest -q -m slow
	FEDLOOM_EXPLORE=1 $(BIN)/pytest -q -n 2 tests/strategies tests/protocols tests/simulations/test_partition.py

test-deploy: $(VENV)/installed  ## SuperLink, SuperNodes and agents for real: TLS, keys, kills, cut links, full disks (an hour or two)
	$(BIN)/pytest -q -s -m deploy

fuzz: $(VENV)/installed  ## A million inputs for every decoder and service (about an hour)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py --inputs 1000000

bench: $(VENV)/installed  ## The figures of docs/benchmarks.md
	$(BIN)/python benchmarks/aggregate.py --layers 2
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/strategies.py --seeds 1 2 3
	$(BIN)/fedloom bench rebuild --params 100000000
	$(BIN)/fedloom bench rebuild --family rademacher
	$(BIN)/fedloom bench step
	$(BIN)/fedloom bench wire
	$(BIN)/python benchmarks/server_memory.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/warm.py
	$(BIN)/python benchmarks/seeds.py demo --seeds 0 1 2 --plot docs/seeds-demo

proto: $(VENV)/installed  ## Regenerate protocols/fedloom_pb2.py
	$(BIN)/python -m fedloom.protocols.generate

docs: $(VENV)/installed  ## Regenerate docs/recipes.md
	$(BIN)/fedloom recipes --reference > docs/recipes.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
