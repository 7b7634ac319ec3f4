# Everything runs in $(VENV), which the targets make when they need it.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
CORE := $(VENV)/.lipllm-core
DEV := $(VENV)/.lipllm-dev
TESTED := $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
GROUP := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint type bench report clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 14

setup: $(DEV)  ## make .venv with the package and the development tools

demo: $(CORE)  ## text in; certified, pruned, served model and report out (ARGS="key=value ...")
	$(BIN)/lipllm pipeline $(ARGS)

test: $(DEV)  ## run the test suite (ARGS="-k name" and the like)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(DEV) type  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(DEV)  ## check types
	$(BIN)/mypy

bench: $(DEV)  ## run the benchmarks
	$(BIN)/python -m pytest -q tests/bench -o python_files='bench_*.py' $(ARGS)

report: $(CORE)  ## draw a run again (ARGS="...", see lipllm report --help)
	$(BIN)/lipllm report $(ARGS)

clean:  ## remove caches; runs and .venv stay
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(CORE): pyproject.toml
	@$(TESTED) || { echo "lipllm needs Python 3.11 to 3.13, found $$($(PYTHON) --version):" \
	  "make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing lipllm into $(VENV): this takes a few minutes once"
	$(PIP) --editable .
	@touch $@

$(DEV): $(CORE)
	@$(BIN)/python -c '$(GROUP)' > $(VENV)/dev.txt
	$(PIP) --requirement $(VENV)/dev.txt
	@touch $@
