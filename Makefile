# Every target makes .venv itself and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The packages as they install, for the type checker: convert/ is mlx_qwen.convert. tools/ is checked beside them.
TYPED := build/typed

.PHONY: demo test lint bench notebooks clean

demo: $(VENV)/.runtime
	$(BIN)/mlx-qwen demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/mlx_qwen
	ln -s $(CURDIR)/metal_kernels $(TYPED)/
	ln -s $(CURDIR)/mlx_qwen/* $(TYPED)/mlx_qwen/
	ln -s $(CURDIR)/convert $(TYPED)/mlx_qwen/
	ln -s $(CURDIR)/tools $(TYPED)/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache metal_kernels mlx_qwen tools

bench: $(VENV)/.dev
	$(BIN)/mlx-qwen bench --vs mlx-lm --kernels-on-off
	$(BIN)/python -m tools.benchmarks

notebooks: $(VENV)/.notebooks
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable .
	@touch $@

# torchvision lies where only the tests look: its wheel for Linux does not import beside a torch for CPUs. Without it a
# few comparisons with transformers' own video processor are skipped.
$(VENV)/.dev: pyproject.toml Makefile | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/reference torchvision==0.28.0
	@touch $@ $(VENV)/.runtime

$(VENV)/.notebooks: pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	@touch $@ $(VENV)/.runtime
