# make reproduce   run the study        make test    lint, types and tests
# make lab         open JupyterLab      make clean   remove the environment; runs stay
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PROFILE ?= embedded
ARGS ?=

.PHONY: help setup reproduce test lab lock clean

help:
	@sed -n '1,2p' Makefile | sed 's/^# //'

setup: $(STAMP)

# The environment is remade when what it is made from changes; a broken one has no stamp.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) -V). Name one: make PYTHON=python3.12 ..."; exit 1; }
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

reproduce: $(STAMP)
	$(BIN)/vaalign reproduce --profile $(PROFILE) $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vaalign_lib
	$(BIN)/python -m pytest $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks --config=$(CURDIR)/notebooks/lab_config.py $(ARGS)

# Pin anew what the ranges of pyproject.toml allow today, in a fresh environment.
lock: clean
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep -oE 'torch>=[0-9.]+' pyproject.toml | sed 's/>=/==/').*" setuptools
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//' > requirements.lock

# Only what make and its tests wrote: VENV goes if it is an environment.
clean:
	@test ! -f "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
	rm -rf build/lib build/bdist.* vaalign.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
