# make finetune   sets up everything and fine-tunes a 1-bit ResNet-18 on embedded images
# make test       sets up everything and runs the tests
# make test-all   the tests that take minutes: kills of training runs, the notebook, all combinations
# make lint       formatting, lint and types
# make docs       the documentation, in build/docs; a warning is an error
# make sanitize   the native kernels under the address and undefined-behaviour sanitizers, spoilt calls too
# make test-neon      the NEON kernels under an emulator (Debian: g++-aarch64-linux-gnu, qemu-user)
# make test-avx512    the AVX-512 kernels, emulated (Debian: libsimde-dev)
# make test-vpopcnt   those that count bits, emulated (Debian: libsimde-dev)
# make test-amx       those on matrix tiles, emulated (Debian: libsimde-dev)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := $(wildcard $(addprefix fqt_jax/kernels/csrc/, *.cc *.h *.inc CMakeLists.txt))

.PHONY: finetune test test-all lint format docs sanitize test-neon test-avx512 test-vpopcnt test-amx clean

finetune: $(VENV)/.experiments
	$(BIN)/python -m experiments.finetune --learning-rate 1e-3 --epochs 10 --batch-size 64 $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m slow $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo "the documentation is in build/docs/index.html"

CSRC := fqt_jax/kernels/csrc
CHECK := -std=c++17 -O1 -ffp-contract=off -fno-trapping-math -fno-math-errno -w -I$(CSRC) \
  $(wildcard tests/kernels/native/check*.cc) $(CSRC)/isa.cc
# Those for other processors are empty.
ISAS := $(wildcard $(CSRC)/kernels_*.cc)
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
# Python itself is not instrumented: the sanitizer's runtime has to be loaded first.
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)
CASES ?= 300
SPOILT ?= 20000
SANITIZED ?= tests/kernels/test_native.py tests/kernels/test_bad_calls.py tests/kernels/test_transforms.py \
  tests/kernels/test_float_conv.py tests/kernels/test_draws.py tests/test_adam.py

sanitize: $(VENV)/.sanitize
	mkdir -p build/sanitize
	$(CXX) $(CHECK) $(ISAS) $(SANITIZE) -o build/sanitize/check
	build/sanitize/check 0 $(CASES)
	$(BIN)/cmake -S $(CSRC) -B build/sanitize/cmake -DFQT_JAX_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/sanitize/cmake
	rm -rf build/sanitize/tree && mkdir build/sanitize/tree
	cp -r fqt_jax tests pyproject.toml build/sanitize/tree
	rm -f build/sanitize/tree/fqt_jax/kernels/_native*.so
	cp build/sanitize/cmake/_native*.so build/sanitize/tree/fqt_jax/kernels
	cd build/sanitize/tree && export LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0 && \
	  $(abspath $(BIN)/python) -c "import fqt_jax.kernels._native as m; assert 'sanitize' in m.__file__" && \
	  $(abspath $(BIN)/python) -m pytest -p no:cacheprovider $(SANITIZED) && \
	  $(abspath $(BIN)/python) -m tests.kernels.native.fuzz 0 $(SPOILT)

test-neon:
	mkdir -p build
	aarch64-linux-gnu-g++ -static $(CHECK) $(ISAS) -o build/check-neon
	qemu-aarch64 build/check-neon 0 $(CASES)

test-avx512 test-vpopcnt test-amx: test-%:
	mkdir -p build
	$(CXX) -mavx2 -mfma -mpopcnt -mbmi2 -DFQT_ONLY_ISA=$* $(CHECK) tests/kernels/native/$*_emulated.cc \
	  -o build/check-$*
	build/check-$* 0 $(CASES)

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fqt_jax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of packages, newer than pyproject.toml and the C++ sources once they are
# installed and built.
$(VENV)/.experiments $(VENV)/.test $(VENV)/.docs $(VENV)/.sanitize: $(VENV)/.%: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@
