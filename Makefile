PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= gpu-figures
MINUTES ?= 5

.PHONY: quickstart test test-all lint format bench evidence fuzz gpu assets docs clean

quickstart: $(VENV)/.installed  ## install, then four rounds of DDO on the embedded default, and as many of its control
	$(BIN)/ddo finetune-ddo --rounds 4 --alpha 4 --beta 0.05 --control
	@echo "To type ddo in this shell: source $(BIN)/activate"

test: $(VENV)/.installed-dev lint  ## lint, types and the quick tests, which cover every line: at most 5 minutes on 2 cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

# One process more than cores: many of these tests wait for processes that they start.
test-all: $(VENV)/.installed-dev lint  ## and the full cross products, marked slow
	$(BIN)/python -m pytest --numprocesses $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## ratios measured side by side
	$(BIN)/python benchmarks/run.py

evidence: $(VENV)/.installed-dev  ## every figure of the README by its commands, into docs/evidence; hours, resumable
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py $(if $(ONLY),--only $(ONLY))

fuzz: $(VENV)/.installed-dev  ## mutated inputs for every parser, for MINUTES; what fails is kept in fuzz-failures
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) $(FUZZ)

gpu:  ## on a GPU: its tests, speeds, and with DATA=cifar10-32x32.zip the experiment; figures in OUT. Needs no install
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py \
	    --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY)) $(GPU_OPTIONS)

docs: $(VENV)/.installed-docs  ## the pages of docs/ in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

assets: $(VENV)/.installed-dev  ## rebuild ddo_cli/assets from the recipes, and tell what changes
	$(BIN)/python -m ddo_cli.assets.build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
