# make test   everything, and it passes
# make bench  a parity-gated throughput table, plots and pictures of this machine, in minutes
# make sanitize  the C++ under AddressSanitizer and UBSan: minutes to build, minutes to run
# Both need Python >= 3.11, a C++ compiler and make; `make setup` does the rest in .venv.

PYTHON ?= python3
RESULTS ?= benchmarks/results/local
BIN := .venv/bin
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/*.cpp)

.PHONY: setup test bench bench-full check sanitize lint format clean

setup: .venv/installed

# A torch (and triton) that is already there is used, never a second one downloaded.
.venv/installed: requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*/*)
	test -d .venv || { $(PYTHON) -m venv --system-site-packages .venv; \
	  $(BIN)/python -c "import torch" 2>/dev/null || $(PYTHON) -m venv --clear .venv; }
	have=$$($(BIN)/python -c "from importlib.util import find_spec; \
	  print('|'.join(filter(find_spec, ('torch', 'triton', 'numpy'))) or 'none')"); \
	grep -vE "^($$have)==" requirements-dev.txt > .venv/requirements.txt
	grep '^torch==' .venv/requirements.txt | $(BIN)/pip install -q -r /dev/stdin
	$(BIN)/pip install -q -r .venv/requirements.txt
	$(BIN)/pip install -q --no-index --no-build-isolation --no-deps -e .
	touch $@

test: setup
	$(BIN)/python -m pytest tests

bench: setup
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --results $(RESULTS)
	$(BIN)/python -m benchmarks.photographs --out $(RESULTS)/photographs
	$(BIN)/dfm-fast report $(RESULTS)

bench-full: setup
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --full --results $(RESULTS)
	$(BIN)/python -m benchmarks.photographs --out $(RESULTS)/photographs
	$(BIN)/dfm-fast report $(RESULTS)

check: setup
	$(BIN)/dfm-fast check

# A copy, whose build is not that of other targets. Python itself is not sanitized: it has to load
# the sanitizers first, and leaks are its own.
SANITIZE := build/sanitize
sanitize: setup
	mkdir -p $(SANITIZE)
	cp -r dfm_fast kernels csrc tests setup.py pyproject.toml README.md $(SANITIZE)/
	rm -f $(SANITIZE)/dfm_fast/*.so
	ln -sfn ../kernels $(SANITIZE)/dfm_fast/kernels
	cd $(SANITIZE) && DFM_FAST_SANITIZE=1 DFM_FAST_BUILDS=_C \
	  $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZE) && ATEN_CPU_CAPABILITY=default PYTHONPATH=. OMP_NUM_THREADS=2 \
	  ASAN_OPTIONS=detect_leaks=0:new_delete_type_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(abspath $(BIN))/python -m pytest -q -x tests/test_library.py tests/test_threads.py \
	  -p no:cacheprovider -k "parity or layout_kept or empty_batch or inputs_untouched or threads"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv build dist *.egg-info dfm_fast/*.so
