# Run `make help` for the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
# Newer than what it was made from: nothing to install.
STAMP := $(VENV)/.mmscale-installed

# The launchers and ninja are looked up on the path.
export PATH := $(BIN):$(PATH)

# Test processes at once, a file each: a launched run waits much of its time.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# What open_clip's trainer needs and we must not have: seen only by the processes that run it.
PEERS := $(VENV)/peers

# The lowest versions that pyproject.toml allows.
OLDEST ?= .venv-oldest

DEMO_RUN := runs/demo
DEMO_DATA := runs/demo-data

.PHONY: help setup demo test test-slow test-soak test-oldest check peers bench bench-data bench-loss bench-step gpu chaos

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make the environment (VENV=dir puts it elsewhere)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mmscale needs Python 3.11 or newer and {sys.executable} is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml tools/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c tools/constraints.txt -e ".[deepspeed,dev,adapters,sentence-transformers,wandb,tensorboard,onnx,maps,sweep,datasets,cloud,faiss]"
	touch $@

demo: setup  ## render pairs, pack, train, evaluate, diagnose: runs/demo/report.html
	rm -rf $(DEMO_RUN) $(DEMO_DATA)
	$(BIN)/mmscale synth --out $(DEMO_DATA)/synthetic --images 6000 --seed 0
	$(BIN)/mmscale pack $(DEMO_DATA)/synthetic --out $(DEMO_DATA)/packed
	$(BIN)/mmscale train demo run.dir=$(DEMO_RUN) run.resume=never run.overwrite=true \
		data.train=$(DEMO_DATA)/packed/train data.eval=$(DEMO_DATA)/packed/val
	$(BIN)/mmscale doctor $(DEMO_RUN)

test: setup  ## the default suite: unit, real ranks, real launches
	$(PYTEST) -m "not slow and not soak and not gpu"

test-slow: setup  ## what takes minutes
	$(PYTEST) -m "slow and not soak"

test-soak: setup  ## tens of minutes: large samples, every registered model, second launchers
	$(BIN)/python -m pytest -m soak --timeout 0 -s

$(OLDEST)/.installed: pyproject.toml | $(STAMP)
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct -e ".[deepspeed,adapters,dev]"
	touch $@

test-oldest: $(OLDEST)/.installed  ## units and ranks with the lowest versions allowed (5 GB beside, in OLDEST=dir)
	PATH="$(abspath $(OLDEST))/bin:$(PATH)" $(OLDEST)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile \
		-m "not slow and not soak and not gpu" tests/unit tests/ranks

check: setup  ## format, lint, layers, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(PEERS)/.installed: tools/peers.txt | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(PEERS) -r tools/peers.txt
	touch $@

peers: $(PEERS)/.installed  ## open_clip's trainer beside: what the benchmarks compare with

bench: bench-data bench-loss bench-step  ## all three against open_clip

bench-data: peers  ## samples a second from shards to batches: runs/bench-data.json
	$(BIN)/python -m tools.bench data --json runs/bench-data.json

bench-loss: peers  ## a loss forward and back: runs/bench-loss.json
	$(BIN)/python -m tools.bench loss --json runs/bench-loss.json

gpu: peers  ## what only a CUDA device can show: tests/gpu, a step and a loss; docs/results/gpu.md
	$(BIN)/python -m tools.gpu

bench-step: peers  ## a training update: runs/bench-step.json
	$(BIN)/python -m tools.bench step --json runs/bench-step.json

chaos: setup  ## kill -9 a run twenty times, compare with an uninterrupted one: runs/chaos.md
	$(BIN)/python tools/chaos.py --kills 20 --table runs/chaos.md
