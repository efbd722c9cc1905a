# make demo: an environment, then the bundled model solves a Sudoku before your eyes.
# make test: an environment, then the whole test suite. PYTHON=python3.12 make … chooses another Python.

PYTHON ?= python3
BIN := .venv/bin
# torch is pinned here, and only here, so that a machine without a GPU gets the CPU build.
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test lint clean

demo: .venv/.base
	@$(BIN)/dgemma run --seed 1 --pace 0.3 \
	  "Please solve this Sudoku: 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright

# An environment that already has a torch (a GPU machine's image, say) is used; otherwise torch is installed: the
# CPU build without an NVIDIA GPU (from the sources pip is set up with if they have it, else PyTorch's own index).
.venv/.base: pyproject.toml
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	  else $(PYTHON) -m venv .venv; fi
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then true; \
	  elif command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	    $(BIN)/pip install --quiet "$(TORCH)"; \
	  else $(BIN)/pip install --quiet "$(TORCH)+cpu" 2>/dev/null \
	    || $(BIN)/pip install --quiet "$(TORCH)" --extra-index-url $(CPU_INDEX); fi
	@$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.base
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
