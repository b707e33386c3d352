PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The two builds of FAISS own one module, so that installing one removes the other.
FAISS ?= cpu
OTHER_FAISS := $(if $(filter gpu,$(FAISS)),faiss-cpu,faiss-gpu)
INSTALLED := $(VENV)/.installed-$(FAISS)
# Every command sees the same offline, single-machine world.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-slow lint format proto benchmark clean

help:
	@echo "make demo       set up, start a server on the default index, locate eight sample views, stop"
	@echo "make test       set up, lint, type-check and run the test suite"
	@echo "make test-slow  the tests that need minutes or many gigabytes"
	@echo "make lint       ruff and mypy"
	@echo "make proto      regenerate engine/geosurge/v1 from proto/"
	@echo "make benchmark  the search against the dense product, a server against the bare engine"
	@echo "FAISS=gpu make ...  installs the GPU build of FAISS instead of the CPU one"

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip uninstall --quiet --yes $(OTHER_FAISS)
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS),train,bulk,heif,dev]'
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(INSTALLED)
	$(BIN)/geosurge demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

proto: $(INSTALLED)
	$(BIN)/python proto/generate.py

benchmark: $(INSTALLED)
	$(BIN)/python tests/benchmarks/search.py
	$(BIN)/python tests/benchmarks/serving.py

clean:
	rm -rf $(VENV) build dist
