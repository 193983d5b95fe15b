# Two commands do everything: `make demo` and `make test`. Each sets up what it needs, from the locks.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
export DAGSTER_HOME ?= $(CURDIR)/.dagster_home
export DAGSTER_DISABLE_TELEMETRY := 1

.PHONY: help demo ui test check soak slow bench docs lock clean

help: ## Shows this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/.runtime ## Makes the whole chain of `nano`, from raw text to a Hugging Face model
	$(BIN)/levanter run nano

ui: $(VENV)/.runtime ## Opens the Dagster UI on 127.0.0.1:3000 over the same instance
	$(BIN)/levanter ui

test: $(VENV)/.dev ## Runs every test but the soak, three files at a time
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev ## Format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

soak: $(VENV)/.dev ## Injects every fault and writes the table of them; SOAK_SEEDS=2 for fewer kills
	rm -f .soak.jsonl
	SOAK_SEEDS=$(or $(SOAK_SEEDS),20) LEVANTER_TRIALS=$(CURDIR)/.soak.jsonl \
		$(BIN)/pytest -m "slow or not slow" tests/faults tests/training/test_bitwise.py tests/pipelines/test_products.py \
		--deselect tests/faults/test_catalogue.py $(ARGS)
	$(BIN)/python tests/faults/catalogue.py .soak.jsonl docs/reliability.md

slow: $(VENV)/.dev ## Runs the long tests of scale, and of optimizers that take long to compile
	$(BIN)/pytest -m slow --ignore tests/faults --ignore tests/training/test_bitwise.py \
		--ignore tests/pipelines/test_products.py $(ARGS)

bench: $(VENV)/.dev ## Prints the benchmarks as JSON lines
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.dev ## Writes the API reference, from the docstrings, to docs/api
	$(BIN)/pdoc --docformat google --output-directory docs/api haliax modeling resources assets

# `--no-compile`: Python keeps the bytecode of what is imported, a tenth of what is installed.
# The project itself is installed editable without build isolation: its builder is locked as well.
$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed; name one, e.g. make PYTHON=/usr/bin/python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --require-hashes --no-deps -r requirements.lock
	$(PIP) install --quiet --no-compile --no-deps --no-build-isolation -e .
	touch $@

# PyTorch serves only the parity tests. Its CPU build is used where the package index in use offers it;
# the general build brings gigabytes of CUDA libraries on Linux.
$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock requirements-torch-cpu.lock requirements-torch.lock
	$(PIP) install --quiet --no-compile --require-hashes --no-deps -r requirements-dev.lock
	{ $(PIP) install --quiet --no-compile --require-hashes --no-deps -r requirements-torch-cpu.lock && \
		$(BIN)/python -c 'import torch'; } || \
		{ echo "No CPU build of PyTorch is offered here: installing the general one."; \
		$(PIP) install --quiet --no-compile --require-hashes --no-deps -r requirements-torch.lock; }
	touch $@

lock: ## Resolves the locks anew from pyproject.toml (needs uv)
	sh .ci/lock.sh

clean: ## Removes the environment and everything made by the demo
	rm -rf $(VENV) .dagster_home
