# make quickstart   install, prepare text, train on two processes, evaluate, draw
# make test         install what the tests need and run them
# make test-torch   run the tests that depend on torch under another version, in its own environment: VERSION=2.11.0
# make golden       write the golden losses of every tested version of torch
# make test-slurm   run the job scripts on a private Slurm cluster; needs the Debian packages that .ci/run installs
# make test-gpu     train every layout that fits this machine's GPUs and compare each with one GPU
# make torture      attack tiny runs at random and count what was lost: MINUTES=10 SEED=1
# make check        tests, format, lint, types
# make dev          install what contributors need: tests, ruff, mypy, pre-commit
# make docs         build the documentation into site/; dead links and faults of docstrings fail
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/quickstart
DATASET := datasets/quickstart

OTHER_VERSIONS := $(shell $(PYTHON) -m tests.versions others)
VERSION := $(firstword $(OTHER_VERSIONS))
MINUTES := 10
OTHER := .venv-torch-$(VERSION)

.PHONY: install quickstart test other-versions get-torch test-torch golden golden-torch test-slurm test-gpu torture check dev docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.installed-check: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(DATASET)/manifest.json: | install
	$(BIN)/python -m data.prepare --output $(DATASET) --vocab-size 4096 --max-megabytes 12 --include '*.py' \
	    --exclude 'site-packages' --skip-bad-text --input "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

quickstart: install $(DATASET)/manifest.json
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train/main.py --config configs/quickstart.json
	$(BIN)/python -m train.figures --run $(RUN_DIR)
	$(BIN)/python -m train.evaluate --run $(RUN_DIR)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

other-versions:
	@echo $(OTHER_VERSIONS)

# Without constraints, so only the download can fail. Without a cache, which would keep several gigabytes twice.
$(OTHER)/.torch:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --no-cache-dir torch==$(VERSION)
	touch $@

$(OTHER)/.installed: $(OTHER)/.torch tests/versions.py pyproject.toml constraints.txt
	$(PYTHON) -m tests.versions constraints $(VERSION) > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt --editable '.[test]'
	touch $@

get-torch: $(OTHER)/.torch

test-torch: $(OTHER)/.installed
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n 2 $$($(PYTHON) -m tests.versions tests)

golden: $(VENV)/.installed-test
	$(BIN)/python -m tests.golden.write
	for version in $(OTHER_VERSIONS); do $(MAKE) golden-torch VERSION=$$version || exit 1; done

golden-torch: $(OTHER)/.installed
	$(OTHER)/bin/python -m tests.golden.write

test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m train.layout_test

torture: $(VENV)/.installed-test
	$(BIN)/python -m tests.torture --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

dev: $(VENV)/.installed-check

check: $(VENV)/.installed-check test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-torch-* runs datasets site
