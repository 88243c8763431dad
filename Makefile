# Two commands on a fresh machine with Python 3.11+: `make demo` and `make test`. See README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, not all at the installation, which takes a minute and a half; the
# many processes of a run then find them compiled. (An image, whose user writes nothing, compiles all: docker/Dockerfile.)
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo install test chaos lint format docs audit

demo: install  ## two rounds of regularised self-play on a real 135M chat model
	$(BIN)/python -m flows.spin --config deployments/configs/demo.yaml

install:  ## make or complete the virtual environment; does nothing when nothing is missing
	@PYTHON=$(PYTHON) sh scripts/install.sh cpu $(VENV)

# Two at a time: much of the time goes into starting processes. Files that share servers stay together (tests/conftest.py).
test: install  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# CHAOS="--kills 10 --minutes 20" makes it shorter.
chaos: install  ## whole runs under at least 50 kills, faults, a full disk and second flows; half an hour or more
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.harness $(CHAOS)

lint: install  ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## write the configuration reference anew
	$(BIN)/python scripts/config_reference.py

audit: install  ## known vulnerabilities of what is installed; needs PyPI's advisories (or AUDIT_SERVICE=osv)
	sh scripts/audit.sh $(VENV)
