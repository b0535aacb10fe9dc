# `make train` and `make test` work on a fresh machine with Python 3.11 or
# newer: each sets up the virtual environment it needs first.
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
WORKDIR ?= runs/digits
TESTS ?=
BIN := $(VENV)/bin
# XLA takes the memory of each step from the system anew; in huge pages it comes
# to a CPU sooner (a sixth of a step), as does what it compiles with. Only Linux
# knows the variable.
RUN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

.PHONY: train test soak browser recipe aot docs lint format clean

train: $(VENV)/.installed
	$(RUN) train.py --config=configs/digits.py --workdir=$(WORKDIR)
	$(RUN) eval.py --config=configs/digits.py --workdir=$(WORKDIR)

# What tests compile they run once or twice, so that optimising it takes longer
# than it saves. Without XLA's fusion emitters a compilation takes a third of the
# time; from jaxlib 0.11.2 on there is no flag for them.
XLA_TEST_FLAGS = $(shell $(BIN)/python -c "import jaxlib; print( \
  '--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false' \
  if jaxlib.__version__.startswith('0.10.') else '')")
PYTEST = XLA_FLAGS="$(XLA_FLAGS) $(XLA_TEST_FLAGS)" \
  $(RUN) -m pytest -n 2 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) $(TESTS)

# Runs of many processes, with kills, long runs, and more cases of what `test` tests.
soak: $(VENV)/.installed
	$(PYTEST) -m soak $(TESTS)

# Opens the report of a run in Chromium, which must be installed.
browser: $(VENV)/.installed
	$(RUN) -m pytest -m browser tests/test_report_in_browser.py

# The authors' whole recipe on real pixels: fails below 98%.
recipe: $(VENV)/.installed
	$(RUN) train.py --config=configs/digits_recipe.py --workdir=runs/recipe
	$(RUN) eval.py --config=configs/digits_recipe.py --workdir=runs/recipe --json | \
	  $(BIN)/python -c "import json, sys; top1 = json.load(sys.stdin)['ema']['top1']; \
	    print(f'top-1 {top1:.2%}'); sys.exit(top1 < 0.98)"

# Compiles for TPUs and GPUs that are not there, in an environment with libtpu
# (0.7 GB), JAX's CUDA plugin (0.4 GB) and ptxas.
aot:
	$(MAKE) $(AOT_VENV)/.installed VENV=$(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --editable ".[aot]"
	$(AOT_VENV)/bin/python -m pytest -n 2 --dist worksteal -m aot tests/aot

# The site of the documentation, in docs/_build.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[train,test,lint]"
	touch $@

clean:
	rm -rf $(VENV) $(AOT_VENV) runs docs/_build
