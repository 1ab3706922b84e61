# Every target does its own set-up: a fresh clone needs make and one Python >= 3.12, nothing else.
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS ?= demo
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-wide lint test-gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/with-$(EXTRAS)  ## train a tiny Forecast, decode with it, show what moved
	$(BIN)/python -m experiments.demo

test: lint  ## lint, types, CPU tests but the wide cases, doctests, notebooks
	$(PYTEST) -m "not gpu and not wide"

test-wide: lint  ## the same with every case: half an hour and more on two cores
	$(PYTEST) -m "not gpu"

lint: $(VENV)/with-dev  ## ruff and pyrefly only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test-gpu:  ## the gpu tier, with the Python that is already active (a CUDA image)
	python3 -m pytest -m gpu tests

clean:  ## remove the environment
	rm -rf $(VENV)

$(VENV)/with-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# A candidate counts only if it runs and is new enough: a pyenv shim may exist and yet refuse.
$(BIN)/python:
	@for python in python3.12 python3.13 python3 \
	    $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3 2>/dev/null); do \
	  if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$python"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python >= 3.12 with venv (tried python3.12, python3.13, python3 and pyenv)." >&2; \
	echo "       Install one, for example: pyenv install 3.12" >&2; \
	exit 1
