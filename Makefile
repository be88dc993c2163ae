# make quickstart   install, prepare text, train on two processes, evaluate, draw
# make test         install what tests need and run them
# make test-slurm   run the job scripts on a private Slurm, where its Debian packages are installed (.ci/run names them)
# make test-gpu     train every layout that this machine's GPUs hold and compare each with one GPU
# make check        tests, format, lint, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/quickstart
DATASET := datasets/quickstart

.PHONY: install quickstart test test-slurm test-gpu check clean

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

$(DATASET)/manifest.json: | install
	$(BIN)/python -m data.prepare --output $(DATASET) --vocab-size 4096 --max-megabytes 12 --include '*.py' \
	    --exclude 'site-packages' --skip-bad-text --input "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

quickstart: install $(DATASET)/manifest.json
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train/main.py --config configs/quickstart.json
	$(BIN)/python -m train.figures --run $(RUN_DIR)
	$(BIN)/python -m train.evaluate --run $(RUN_DIR)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m train.layout_test

check: $(VENV)/.installed-check test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs datasets
