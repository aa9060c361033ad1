# make demo: a job of 200 bundled prompts on two cards of this machine.   make test: all tests.
# make setup: .venv with everything, for development.   make check: linter, format and types.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
AZURITE := 3.37.0

.PHONY: setup demo test check format clean

setup: $(VENV)/.dev $(VENV)/.azurite-$(AZURITE)

# The base install is enough for the demo.
$(VENV)/.base: pyproject.toml constraints.txt constraints-gaudi.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The server of Azure Blob Storage that the tests use.
$(VENV)/.azurite-$(AZURITE): | $(VENV)/.base
	npm install --loglevel error --no-save --no-package-lock --no-audit --no-fund --prefix $(VENV)/azurite azurite@$(AZURITE)
	touch $@

demo: $(VENV)/.base
	$(BIN)/gaudi-batch demo --output $(DEMO_OUTPUT)

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
