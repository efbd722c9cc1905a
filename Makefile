# make demo: an environment, then the bundled model solves a Sudoku before your eyes.
# make studio: an environment, then the studio opens in the browser.
# make test: an environment, then the whole test suite. PYTHON=python3.12 make … chooses another Python.

PYTHON ?= python3
BIN := .venv/bin
# torch is pinned here, and only here, so that a machine without a GPU gets the CPU build.
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo studio test lint clients sanitize clean

demo: .venv/.base
	@$(BIN)/dgemma run --seed 1 --pace 0.3 \
	  "Please solve this Sudoku: 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

studio: .venv/.studio
	@$(BIN)/dgemma studio $(ARGS)

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

# Real clients of the three APIs against the server, each in an environment of its own under build/clients (a few
# minutes and 2 GB the first time). CLIENTS="openai 'AI SDK'" chooses some.
clients: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py $(CLIENTS)

# The kernels' tests on a build with address and undefined-behaviour sanitizers, AMX in emulation: a minute and a half to
# build on two cores, as much to run. Skipped where there is no g++ with its sanitizers.
ASAN := $(shell g++ -print-file-name=libasan.so 2>/dev/null)
SANITIZED := build/sanitize/libdgemma_cpu.so

sanitize: .venv/.dev
	@if [ -f "$(ASAN)" ] && command -v cmake >/dev/null; then \
	  CXX=g++ cmake -S native -B build/sanitize -DDG_SANITIZE=ON -DDG_EMULATE_AMX=ON >/dev/null && \
	  { cmake --build build/sanitize --parallel >build/sanitize/log 2>&1 || { cat build/sanitize/log; exit 1; }; } && \
	  grep -q __asan_init $(SANITIZED) && \
	  LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DGEMMA_NATIVE=$(SANITIZED) \
	    DGEMMA_FUZZ=8 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/kernels/test_native.py tests/kernels/test_native_attention.py; \
	else echo "make sanitize: skipped, for it needs cmake and g++ with libasan"; fi

# An environment that already has a torch (a GPU machine's image, say) is used; otherwise torch is installed: the
# CPU build without an NVIDIA GPU (from the sources pip is set up with if they have it, else PyTorch's own index).
.venv/.base: pyproject.toml $(wildcard native/*)
	@echo "Making .venv: torch, and the C++ kernels (a few minutes the first time) …"
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	  else $(PYTHON) -m venv .venv; fi
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then true; \
	  elif command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	    $(BIN)/pip install --quiet "$(TORCH)"; \
	  else $(BIN)/pip install --quiet "$(TORCH)+cpu" 2>/dev/null \
	    || $(BIN)/pip install --quiet "$(TORCH)" --extra-index-url $(CPU_INDEX); fi
	@$(BIN)/pip install --quiet --editable .
	@touch $@

# What an extra asks for, without building the package itself again.
define needs
$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print(*(need for extra in '$(1)'.split() for need in extras[extra] if not need.startswith('dgemma')), sep='\n')"
endef

.venv/.studio: .venv/.base
	@$(call needs,serve studio) > .venv/studio.txt
	@$(BIN)/pip install --quiet --requirement .venv/studio.txt
	@touch $@

.venv/.dev: .venv/.base
	@$(call needs,serve studio tools train vision dev) > .venv/dev.txt
	@$(BIN)/pip install --quiet --requirement .venv/dev.txt
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
