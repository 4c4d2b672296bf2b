# Targets: install demo test check up status clean. `make help` lists the variables.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
FIND_PYTHON := for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; exit 0; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

.DEFAULT_GOAL := help
.PHONY: help install demo up status test check format clean

help:
	@echo "make install   environment in $(VENV)       PYTHON=python3.12  TORCH=auto|cpu|cuda  WHEELS=DIR  TORCH_INDEX=URL"
	@echo "make demo      close the loop in 5 minutes  QUERIES=FILE.jsonl[.gz]  STATE=DIR  TARGET=PATH_OR_HUB_ID"
	@echo "make up        the same services, no queries, until Ctrl-C  STATE=DIR  TARGET=PATH_OR_HUB_ID"
	@echo "make status    what is served, by whom, and why             STATE=DIR"
	@echo "make test      all tests (a Kafka broker: SLIPSTREAM_KAFKA=host:port)"
	@echo "make check     ruff, mypy, import-linter, codespell"
	@echo "make clean     remove $(VENV), caches, .state and results"

install: $(STAMP)

$(STAMP): pyproject.toml deploy/install.py
	@test -n "$(PYTHON)" || { echo "no python3 >= 3.11 on PATH; install one or name it: make install PYTHON=/path/to/python3.12" >&2; exit 2; }
	@TORCH="$(TORCH)" WHEELS="$(WHEELS)" TORCH_INDEX="$(TORCH_INDEX)" $(PYTHON) deploy/install.py --venv $(VENV) --stamp $(STAMP)

demo: $(STAMP)
	@$(PY) -m deploy.local.demo $(if $(QUERIES),--queries "$(QUERIES)") $(if $(STATE),--state "$(STATE)") $(if $(TARGET),--target "$(TARGET)")

up: $(STAMP)
	@$(PY) -m deploy.local.supervisor $(if $(STATE),--state "$(STATE)") $(if $(TARGET),--target "$(TARGET)")

status: $(STAMP)
	@$(if $(STATE),SLIPSTREAM_STATE="$(STATE)") $(PY) -m slipstream status

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m codespell_lib

format: $(STAMP)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .state results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
