# `make` lists the targets. Each target sets the environment up first where that is needed.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PORT := 5000
PARALLEL := --numprocesses 2 --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench ui docs lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv from requirements.lock; nothing to do the second time
	@infra/setup.sh

demo: setup ## Train the ternary LeNet-5 on real digits, from raw images to a registered model
	@$(PYTHON) run.py --experiment digits_lenet5_ternary

test: setup ## Run the tests that take less than 20 seconds each
	@$(PYTHON) -m pytest $(PARALLEL) -m "not slow"

test-all: setup ## Run every test
	@$(PYTHON) -m pytest $(PARALLEL)

lint: setup ## Check style, format and types
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m ruff format --check --quiet .
	@$(PYTHON) -m mypy

bench: setup ## Run the benchmarks and print their tables
	@for benchmark in tests/benchmarks/*.py; do PYTHONPATH=. $(PYTHON) $$benchmark || exit; done

ui: setup ## Show the runs in the browser; another port with PORT=5001
	@test -f runs/mlflow.db || { echo "No runs yet: make demo makes the first."; exit 2; }
	@if (: </dev/tcp/127.0.0.1/$(PORT)) 2>/dev/null; then \
		echo "Port $(PORT) is in use; take another one: make ui PORT=$$(($(PORT) + 1))"; exit 2; fi
	@echo "http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PYTHON) -m mlflow ui --workers 1 \
		--backend-store-uri sqlite:///runs/mlflow.db --port $(PORT)

docs: setup ## Draw the picture of the pipeline and write the table of networks again
	@$(PYTHON) docs/draw_pipeline.py
	@$(PYTHON) -m docs.write_networks

lock: setup ## Resolve requirements.lock again from pyproject.toml, keeping versions where they fit
	@$(PYTHON) -m uv pip compile --quiet --python-version 3.11 --python-platform linux --group dev \
		--no-header --no-annotate --output-file requirements.lock pyproject.toml

clean: ## Remove the environment and the caches; runs/ and data/ stay
	@rm -rf .venv setup.log .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
