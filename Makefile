PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAISS ?= cpu
PROTOS := $(wildcard proto/geosurge/v1/*.proto)
# Every command sees the same offline, single-machine world.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-fast test-slow lint format proto benchmark clean

help:
	@echo "make demo       set up, start a server on the default index, locate eight sample views, stop"
	@echo "make test       set up, lint, type-check and run the test suite"
	@echo "make test-slow  the tests that need minutes or many gigabytes"
	@echo "make lint       ruff and mypy"
	@echo "make proto      regenerate engine/geosurge/v1 from proto/"
	@echo "FAISS=gpu make ...  installs the GPU build of FAISS instead of the CPU one"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS),train,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/geosurge demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

proto: $(VENV)/.installed
	$(BIN)/python proto/generate.py

benchmark: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/search.py

clean:
	rm -rf $(VENV) build dist runs
