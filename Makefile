# Two commands on a fresh machine with Python 3.11+: `make demo` and `make test`. See README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiling all modules at the installation takes a minute and a half, so they are compiled at their first import. An
# image compiles all of them, because its user cannot write (docker/Dockerfile).
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo install test chaos lint format docs audit

demo: install  ## two rounds of regularised self-play on a real 135M chat model
	$(BIN)/python -m flows.spin --config deployments/configs/demo.yaml

install:  ## make or complete the virtual environment; does nothing if it is complete
	@PYTHON=$(PYTHON) sh scripts/install.sh cpu $(VENV)

# Two processes, because tests often wait for other processes to start. Files that share servers stay together
# (tests/conftest.py). CONTRIBUTING.md says which tests run when.
test: install  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# A shorter form: make chaos CHAOS="--kills 10 --minutes 20".
chaos: install  ## whole runs under at least 50 kills, faults, a full disk and second flows; an hour or more
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.harness $(CHAOS)

lint: install  ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## write the configuration reference again
	$(BIN)/python scripts/config_reference.py

audit: install  ## known vulnerabilities of the installed packages; needs PyPI's advisories (or AUDIT_SERVICE=osv)
	sh scripts/audit.sh $(VENV)
