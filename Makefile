# make test   everything, and it passes
# make bench  a parity-gated throughput table, plots and pictures of this machine, in minutes
# Both need Python >= 3.11, a C++ compiler and make; `make setup` does the rest in .venv.

PYTHON ?= python3
RESULTS ?= benchmarks/results/local
BIN := .venv/bin
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/*.cpp)

.PHONY: setup test bench bench-full check docs wheel lint format clean

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

# Any warning (a broken link, a page outside of the navigation) is an error. The variable silences a
# notice of the theme's that is none.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Into dist/, checked; torch's libraries are those of the torch beside it. See docs/packaging.md.
wheel: setup
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/abi3audit --strict --summary build/wheel/*.whl
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair -w dist --exclude 'libtorch*' --exclude 'libc10*' \
	  --exclude libgomp.so.1 build/wheel/*.whl
	$(BIN)/python setup.py -q sdist -d dist

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
