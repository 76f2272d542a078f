# make setup | demo | test | lint | audit | bench | docs
# Each target does its own set-up in .venv; a second call reuses it until pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
# Extra arguments for the line that installs torch, for example the index of another build of it.
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
AUDIT_ARGS ?=
BENCH_ARGS ?= --quick

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt $(wildcard start_up/*.*)
KERNELS := $(wildcard moestro/ops/native/*.[ch] moestro/ops/native/build.py)
# no target talks to a model or data hub
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint audit bench docs help

help:
	@echo "make setup   create $(VENV) with moestro and its core dependencies"
	@echo "make demo    train and compare four architectures at equal compute, and write the report"
	@echo "make test    run the tests (PYTEST_ARGS=... adds arguments)"
	@echo "make lint    ruff, formatting, types, import floors"
	@echo "make audit   pins, ranges and licences of all dependencies; known vulnerabilities, where there is a network"
	@echo "make bench   time the layers on this machine (BENCH_ARGS=$(BENCH_ARGS))"
	@echo "make docs    build the pages of docs/ into site/"
	@echo "PYTHON=python3.12 and VENV=dir choose the interpreter and the environment"

setup: $(VENV)/.native

# torch comes first, on its own line: nothing else can then pull in another build of it
$(VENV)/.core: $(PINS)
	@echo "[setup] virtual environment in $(VENV), from $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moestro needs Python >= 3.11: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[setup] torch, at the version of constraints.txt"
	@$(PIP) $(TORCH_PIP_ARGS) torch
	@echo "[setup] moestro and its core dependencies"
	@$(PIP) -e .
	@touch $@

# installing compiles them as well; this is for when their sources change
$(VENV)/.native: $(VENV)/.core $(KERNELS)
	@$(BIN)/python -m moestro.ops.native.build || echo "[setup] going on without native kernels"
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: $(VENV)/.core | $(VENV)/.native
	@echo "[setup] the extra '$*' of moestro"
	@$(PIP) -e ".[$*]"
	@touch $@

demo: $(VENV)/.native
	$(BIN)/moestro compare recipes/compare/first_look.yaml

# tests start many processes, which would each compile every module where bytecode is not to be written
test: $(VENV)/.test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# pip-audit has an environment of its own: none of its packages is among ours
audit: $(VENV)/.dev
	$(BIN)/python -m tools.dependencies
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install -q pip-audit; }
	$(BIN)/python -m tools.dependencies --advisories $(VENV)-audit/bin/pip-audit $(AUDIT_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m bench.hmoe $(BENCH_ARGS)
	$(BIN)/python -m bench.peer $(BENCH_ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
