# make finetune   sets up everything and fine-tunes a 1-bit ResNet-18 on embedded images
# make test       sets up everything and runs the tests
# make lint       formatting, lint and types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := $(wildcard $(addprefix fqt_jax/kernels/csrc/, *.cc *.h *.inc CMakeLists.txt))

.PHONY: finetune test lint format clean

finetune: $(VENV)/.experiments
	$(BIN)/python -m experiments.finetune --learning-rate 1e-3 --epochs 10 --batch-size 64 $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fqt_jax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of packages, newer than pyproject.toml and the C++ sources once they are
# installed and built.
$(VENV)/.experiments $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@
