# make train   a venv, the data, a trained config/mla.py, a sample (ARGS="--overwrite=True" trains it anew)
# make compare the picture and the table of docs/results.md: quality against cache, resumable
# make recall  what a small cache forgets: recall against cache, resumable
# make test    the test suite
# make quick   the tests of it that are not marked slow: about 90 seconds on 2 cores
# make machines  the test suite as on other machines: without C, other compilers, and where `auto` is bfloat16
# make lint    ruff and pyright

PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= config/mla.py
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist=worksteal

.PHONY: train compare recall test quick machines lint clean

train: .venv/run
	$(BIN)/python train.py $(CONFIG) $(ARGS)
	$(BIN)/python sample.py out/$(basename $(notdir $(CONFIG))) --start="class Error(" --temperature=0.5 --max_new_tokens=150

compare: .venv/run
	$(BIN)/python -m tools.sweep config/compare.txt out/compare
	$(BIN)/python compare.py out/compare/* --picture=assets/compare.png --into=docs/results.md

recall: .venv/run
	$(BIN)/python -m tools.recall --picture=assets/recall.png --into=docs/results.md

test: .venv/dev
	$(PYTEST)

quick: .venv/dev
	$(PYTEST) -m "not slow"

machines: .venv/dev
	NANOKV_BACKEND=none $(PYTEST)
	PYTHONPATH=tests/bf16_machine $(PYTEST)
	CC=/bin/false XDG_CACHE_HOME=/nonexistent $(PYTEST) -m "not slow"
	CC=clang $(PYTEST) tests/test_backends.py tests/test_cpu_*.py
	CC=$(CURDIR)/tests/cc_without_openmp $(PYTEST) tests/test_backends.py tests/test_cpu_*.py
	$(PYTEST) -rs tests/test_c_driver.py tests/test_cpu_library.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
