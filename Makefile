# Two commands matter: `make reproduce` and `make test`. Each sets itself up in .venv; all it needs is Python and make.
# Python 3.11 is what constraints.txt was tested with; another: make test PYTHON=python3.12
PYTHON ?= $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)
# How many notebooks are tested at once. Each one uses two threads.
NB_JOBS ?= 1
OUT ?= runs/reproduce

BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := malmen_repro nbs tests tools data_scripts

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help reproduce test lint typecheck check pytest nbtest wheel notebooks export readme format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

reproduce: .venv/.run  ## set up, then run the tiny tier anew into runs/reproduce
	$(BIN)/malmen-repro reproduce --tier tiny --out $(OUT)

# Cheap checks first. pytest comes before the notebooks, which draw the committed figures anew: it must see those of git.
test: lint typecheck wheel pytest nbtest  ## set up, then lint, types, wheel, pytest and notebooks: what CI runs

lint: .venv/.dev  ## ruff over modules, notebooks and tests
	$(BIN)/ruff check $(SOURCES)

typecheck: .venv/.dev  ## mypy over the public interface
	$(BIN)/mypy

check: .venv/.dev  ## notebooks clean, modules in step with them, version and packaging
	$(BIN)/python -m pytest tests/test_package.py

# Warnings are errors, and the shapes in the signatures are checked (tests/conftest.py).
pytest: .venv/.dev  ## pytest, with the shapes of all arguments checked
	HF_HUB_OFFLINE=1 MPLBACKEND=agg $(BIN)/python -m pytest

# A process for each notebook: none leans on what an earlier one left behind. Any failure makes xargs fail, after the rest.
nbtest: .venv/.dev  ## nbdev_test over all notebooks
	find nbs -name "*.ipynb" -not -path "*/.*" | sort | HF_HUB_OFFLINE=1 xargs -n 1 -P $(NB_JOBS) $(BIN)/nbdev_test --timing --path
	@echo "nbdev_test: $$(find nbs -name "*.ipynb" -not -path "*/.*" | wc -l) notebooks passed"

# The wheel and what it asks for, nothing else, in an environment of its own.
wheel: .venv/.dev  ## build the wheel and import it without the development tools
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	test -d .venv-wheel || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip uninstall --quiet --yes malmen-repro
	.venv-wheel/bin/python $(PIP_INSTALL) dist/*.whl
	cd dist && HF_HUB_OFFLINE=1 ../.venv-wheel/bin/python -I ../tools/check_wheel.py

notebooks: .venv/.dev  ## execute all notebooks in place, keeping the outputs of flagged cells, and clean them
	$(BIN)/python tools/execute_notebooks.py

export: .venv/.dev  ## write the modules from the notebooks
	$(BIN)/nbdev_export

readme: .venv/.dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/make_readme.py

format: .venv/.dev  ## let ruff repair what it can, in the notebooks first, then export and clean
	$(BIN)/ruff check --fix nbs tests tools
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

clean:  ## remove what was built, not the records
	rm -rf .venv .venv-wheel build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The set-up, once, and again when pyproject.toml or constraints.txt change.
.venv/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (once; PyTorch is large) ..."
	$(BIN)/python $(PIP_INSTALL) --editable '.[replication]'
	@touch $@

.venv/.dev: .venv/.run
	@echo "Installing the development tools into .venv (once) ..."
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@
