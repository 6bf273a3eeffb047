# Two commands do everything from a fresh clone: `make demo` and `make test`.
# Both make their own .venv and install what is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
export PYTHONUNBUFFERED := 1

.PHONY: setup demo test slow lint types protos check-protos format bench-% clean help

help:
	@echo "make demo    the main job, on real data, everything embedded (stop with Ctrl-C)"
	@echo "make test    set up, lint, type-check, test"
	@echo "make slow    the minutes-long tests"
	@echo "make lint | types | protos | bench-NAME"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/lock.txt deploy/system-packages.sh
	sh deploy/system-packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/lock.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: setup
	$(BIN)/shoal demo

test: lint types check-protos
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --ignore-glob='*_browser.py'
	$(BIN)/python -m pytest -m "not slow" tests/web/test_browser.py tests/web/test_device_browser.py

slow: setup
	$(BIN)/python -m pytest -m slow --ignore-glob='*_browser.py'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# protos and agent promise Python 3.10, so they are checked as such.
types: setup
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 protos agent

protos: setup
	PYTHON=$(BIN)/python sh protos/generate.sh

check-protos: setup
	PYTHON=$(BIN)/python sh protos/generate.sh --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-%: setup
	$(BIN)/python benchmarks/$*.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
