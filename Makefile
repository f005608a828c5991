# make demo   the whole road on the embedded default: environment, install, train, report
# make test   environment, linting, formatting, types, then every test but the slow ones
# make test-slow   those: minutes of a compiler each

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers: a file's tests stay together, so its fixtures and compiled functions are reused.
WORKERS ?= -n 2 --dist loadfile
PYTEST_ARGS ?= $(WORKERS) -m "not slow"

# The newest Python whose JAX releases pyproject.toml admits beyond the default's.
NEXT_PYTHON ?= python3.12
NEXT_VENV ?= .venv-next
# The contract, what every method promises, the step and the kernels need no more than JAX.
NEXT_TESTS = tests/tree_test.py tests/model_test.py tests/methods_test.py tests/train/step_test.py \
  $(wildcard tests/pallas_kernels)

.PHONY: demo test test-slow lint format test-next clean

demo: $(VENV)/.installed
	$(BIN)/jaxpeft train

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The core and the kernels on the next Python with the newest JAX in range; without torch, whose
# pinned build belongs to the default Python.
test-next:
	@if ! $(NEXT_PYTHON) --version >/dev/null 2>&1; then \
	  echo "test-next: no $(NEXT_PYTHON) here, skipped"; \
	else $(MAKE) run-next; fi

.PHONY: run-next
run-next: $(NEXT_VENV)/.installed
	$(NEXT_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(NEXT_TESTS)

# Stamps: an install is repeated only when the requirements change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxpeft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@ $(VENV)/.installed

$(NEXT_VENV)/.installed: pyproject.toml
	$(NEXT_PYTHON) -m venv $(NEXT_VENV)
	$(NEXT_VENV)/bin/python -m pip install --quiet --editable '.[describe]' pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-next out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
