# The doors of the project. `make help` lists them; CI runs nothing else.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRIALS ?= 12
STUDY ?= demo
OUT ?= caddie-runs

.PHONY: help install demo docs test test-faults check audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s '	'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing pinned dependencies into $(VENV) (some minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed ## make .venv with everything pinned

demo: install ## a real sweep on this machine (TRIALS=12, NEW=1 for a fresh study)
	@$(BIN)/caddie sweep run smoke --study $(STUDY) --trials $(TRIALS) --workers-per-trial 2 --out $(OUT) $(if $(NEW),--new)

docs: install ## the pages of docs/ as a site, in site/
	@$(BIN)/mkdocs build --quiet --site-dir site

# Two files at a time: much of the service's tests is waiting for processes.
test: install ## the whole CPU test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-faults: install ## nodes, heads and drivers that die, on real clusters here (some minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults tests/service_tests

check: install ## ruff, ruff format, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

audit: ## known vulnerabilities of the pinned versions, by pip-audit (asks PyPI)
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit; }
	@.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean: ## remove the environment and caches, not your runs
	@rm -rf $(VENV) .audit *.egg-info .mypy_cache .ruff_cache .pytest_cache
