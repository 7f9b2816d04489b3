# `make demo` is the whole pipeline on a fresh Linux machine; `make check` is what a change must pass.
# Everything is installed into $(VENV), at the exact versions of constraints.txt.
#   PYTHON=python3.12   another interpreter than the one found by itself (3.11, 3.12 or 3.13)
#   OUT=DIR ARGS=...    for `make demo`: where to write, more options (ARGS=--smoke)
#   ARGS=...            for the tests: options of pytest (ARGS='-k gate -x')
#   WORKERS=4           for the tests: processes that share them, a file to each (2)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?=
VENV ?= .venv
OUT ?= demo-out
ARGS ?=
WORKERS ?= 2

DEMO_EXTRAS := distill,export,onnx,report
DEV_EXTRAS := $(DEMO_EXTRAS),coreml,dev

# Waiting threads sleep instead of burning the core that another thread needs.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := $(VENV)/bin

.PHONY: help demo test test-all lint check lock clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo  ## distil, export, run, measure: a report in demo-out/report/index.html
	@$(BIN)/pocketvlm demo --out "$(OUT)" $(ARGS)

test: $(VENV)/.installed-dev  ## the tests, but for those marked slow
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev  ## all tests
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev  ## style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

check: lint test  ## style, types, tests

lock:  ## write constraints.txt anew from the newest versions that pyproject.toml allows (compiles llama.cpp)
	@$(call find_python); rm -rf .venv-lock; "$$python" -m venv .venv-lock
	@.venv-lock/bin/python -m pip install -q -e '.[all,dev]'
	@{ sed -n '/^#/p' constraints.txt; \
	   .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt; rm -rf .venv-lock

clean:  ## remove what was installed and cached; a demo's output stays
	@rm -rf .venv .venv-installing .venv-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis constraints.txt.new
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sets $$python to an interpreter that can make a venv, or says what was found and what is wanted.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
define find_python
found=; python=; \
for name in $(CANDIDATES); do \
  version=$$("$$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
  case $$version in 3.11|3.12|3.13) ;; *) found+=" $$name is $$version;"; continue ;; esac; \
  if "$$name" -c 'import venv, ensurepip' 2>/dev/null; then python=$$name; break; fi; \
  found+=" $$name has no venv (Debian: apt install python$$version-venv);"; \
done; \
if [ -z "$$python" ]; then \
  echo "make: wanted Python 3.11, 3.12 or 3.13; looked for $(CANDIDATES); found$${found:- none;}" \
    "set PYTHON=/path/to/python" >&2; \
  exit 2; \
fi
endef

# The stamp comes last. $(VENV)-installing marks an installation under way: a venv in which one was cut short is
# made anew (pip keeps its downloads), so that no half-unpacked package stays behind.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@if [ -d $(VENV)-installing ] || ! [ -x $(BIN)/python ]; then \
	   $(find_python); mkdir -p $(VENV)-installing; \
	   echo "make: $(VENV) from $$python"; "$$python" -m venv --clear $(VENV); \
	 fi
	@mkdir -p $(VENV)-installing
	@echo "make: installing into $(VENV) (several GB the first time: torch brings its CUDA libraries)"
	@$(BIN)/python -m pip install $(if $(CI),-q) --no-input -c constraints.txt -e '.[$($(if $(filter dev,$*),DEV,DEMO)_EXTRAS)]'
	@rmdir $(VENV)-installing
	@touch $@
