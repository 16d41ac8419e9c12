# make demo, test, test-engines, test-all, test-torchtitan, lint, docs, matrix, zoo, fuzz and engines each work on their own on a fresh machine with Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-engines test-all test-torchtitan lint docs matrix zoo fuzz engines clean

# torch comes first, alone and pinned: a range could be met by a build with several GB of CUDA packages.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[zoo,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps nudenet  # for the YOLO graph inside
	touch $@

$(VENV)/docs: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

demo: $(VENV)/base
	$(BIN)/laurel-rewrite tools/examples/gpt.py --variant rw+lr --rank 16

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto

# What trains in other packages' engines, or in several processes: every cell of docs/engines.md among it.
test-engines: $(VENV)/dev
	$(BIN)/python -m pytest -n auto -m "engines and not slow" tests

# The cases that are marked slow too.
test-all: $(VENV)/dev
	$(BIN)/python -m pytest -n auto -m ""

# torchtitan's own trainer with LAuReL, on two processes; about five minutes. Its packages lie beside the others, for this alone.
test-torchtitan: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/torchtitan --requirement tests/torchtitan.txt
	PYTHONPATH=$(abspath $(VENV)/torchtitan) $(BIN)/python -m pytest -m engines tests/test_torchtitan.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build; a warning is an error.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build

# The quick tests on the lowest and on the newest versions, one environment after another, each about 6 GB and deleted behind it; ten minutes of tests
# each. Writes a dated table under tools/results/. MATRIX="-n 0" is for one process.
MATRIX ?= -n auto
matrix: $(VENV)/nox/bin/nox
	$(VENV)/nox/bin/nox -- $(MATRIX)

$(VENV)/nox/bin/nox: constraints.txt
	$(PYTHON) -m venv $(VENV)/nox
	$(VENV)/nox/bin/python -m pip install --quiet --constraint constraints.txt nox
	touch $@

# About ten minutes; writes a dated table under tools/results/.
zoo: $(VENV)/dev
	$(BIN)/python tools/zoo.py

# Ten minutes of random cases, from where the last run stopped.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/dev
	$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS) --state .fuzz.json

# Every cell of docs/engines.md, in about six minutes.
engines: $(VENV)/dev
	$(BIN)/python -m tools.engines

clean:
	rm -rf $(VENV) .nox laurel_out .fuzz.json docs/_build docs/operators
