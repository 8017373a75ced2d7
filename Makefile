# Two commands do everything: `make demo` and `make test`. They need Python 3.11+ with venv, and a C compiler.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
# cpu or gpu: which faiss wheel. Both install the module `faiss`, so each has an environment of its own.
FAISS ?= cpu
VENV ?= $(if $(filter gpu,$(FAISS)),.venv-gpu,.venv)
WORKERS ?= 2

BIN := $(VENV)/bin
# The environment is as current as these two files: changing one installs again.
DEFINITION := pyproject.toml constraints.txt
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test
# One thread a process: the test workers share the cores between them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-slow lint typecheck fast-tests docs docker-smoke clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(DEMO_STAMP) ## install and serve the demo index on http://127.0.0.1:8000
	$(BIN)/astroclip demo --host $(HOST) --port $(PORT)

test: $(TEST_STAMP) lint typecheck fast-tests ## lint, types and the fast test suite

test-slow: $(TEST_STAMP) ## the suites that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

typecheck: $(TEST_STAMP)
	$(BIN)/mypy

fast-tests: $(TEST_STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

docs: $(TEST_STAMP) ## refill the generated tables of README.md and docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/readme_tables.py

docker-smoke: ## build the CPU image, run it, embed one file (Docker, or buildah without an engine)
	docker/smoke.sh

clean: ## remove the environment and caches
	rm -rf .venv .venv-gpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_STAMP): EXTRAS = $(FAISS)
$(TEST_STAMP): EXTRAS = $(FAISS),train,simulate,dev
$(DEMO_STAMP) $(TEST_STAMP): $(DEFINITION) | $(BIN)/python
	@echo "installing astroclip[$(EXTRAS)] into $(VENV): about 6 GB, some minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "astroclip needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1); mend: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
