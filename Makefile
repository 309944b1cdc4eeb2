# Every target makes .venv itself and is quick the second time. `make demo PYTHON=/path/to/python3.13` says of what.
VENV := .venv
BIN := $(VENV)/bin
# The first of these that is new enough makes .venv; macOS itself has Python 3.9 as python3.
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 \
	/opt/homebrew/bin/python3 /usr/local/bin/python3)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# Made anew where it is missing, was left half-made, or is of a Python that is too old or gone.
FRESH := $(shell $(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || echo venv)
# The packages as they install, for the type checker: convert/ is mlx_qwen.convert. tools/ is checked beside them.
TYPED := build/typed

.PHONY: demo test clients lint bench notebooks clean venv

demo: $(VENV)/.runtime
	$(BIN)/mlx-qwen demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Coding agents from the npm registry, which talk to the engine on this machine; some 1.5 GB in build/.
clients: $(VENV)/.dev build/clients/.installed
	$(BIN)/python -m pytest tests/clients

build/clients/.installed: tests/clients/package.json tests/clients/package-lock.json
	@command -v npm >/dev/null || { echo "make clients needs npm, of Node.js 20 or newer." >&2; exit 1; }
	mkdir -p build/clients
	cp $^ build/clients/
	cd build/clients && npm install --no-audit --no-fund --loglevel=error
	@touch $@

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

venv:
	@for python in $(PYTHONS); do \
		if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
			rm -rf $(VENV) && exec $$python -m venv $(VENV); \
		fi; \
		version="$$($$python --version 2>/dev/null)" && echo "$$python is $$version, which is too old." >&2; \
	done; \
	echo "mlx-qwen needs Python 3.11 or newer. Install one from https://www.python.org/downloads, or with" >&2; \
	echo "'brew install python' or 'uv python install', then: make demo PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/.runtime: pyproject.toml $(FRESH)
	@echo "Installing what mlx-qwen needs into $(VENV): a minute or more, the first time."
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[chat]'
	@touch $@

# torchvision lies where only the tests look: its wheel for Linux does not import beside a torch for CPUs. Without it a
# few comparisons with transformers' own video processor are skipped.
$(VENV)/.dev: pyproject.toml Makefile $(FRESH)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/reference torchvision==0.28.0
	@touch $@ $(VENV)/.runtime

$(VENV)/.notebooks: pyproject.toml $(FRESH)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	@touch $@ $(VENV)/.runtime
