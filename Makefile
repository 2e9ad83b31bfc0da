# Every command sets up what it needs; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Two processes with one thread each beat one process with two: most tests are many small tensors.
JOBS   ?= 2

.PHONY: help demo test check bench docs clean
help:            ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: $(VENV)/core  ## install, audit the embedded default network, say where the report is
	$(BIN)/lineament audit --out lineament-report --overwrite

test: $(VENV)/dev   ## install, then the whole test suite
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(VENV)/dev  ## lint, format, types, import contract, documentation
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/pyright
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/peers  ## every benchmark, ours beside the peers
	$(BIN)/lineament bench --json bench.json

docs: $(VENV)/dev   ## the documentation at http://127.0.0.1:8000, rebuilt as you write
	$(BIN)/mkdocs serve

clean:           ## remove what the commands above made
	rm -rf $(VENV) site build dist lineament-report bench.json

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/core: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/core

# These peers ask for packages that they do not need here (torchvision, BackPACK, wandb, a web client) or that can no longer be built (sklearn): what they do
# need is named.
$(VENV)/peers: $(VENV)/dev
	$(PIP) --editable '.[dev,peers]'
	$(PIP) --no-deps PyHessian curvlinops-for-pytorch linear_operator einops einconv inseq treescope transformer-lens better-abc gbnn
	touch $@
