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
# One thread a process: the test workers share the cores; a file stays in one worker, with its fixtures.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-slow chaos lint typecheck fast-tests docs docker-smoke clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(DEMO_STAMP) ## install and serve the demo index on http://127.0.0.1:8000
	$(BIN)/astroclip demo --host $(HOST) --port $(PORT)

test: $(TEST_STAMP) lint typecheck fast-tests ## lint, types and the fast test suite

test-slow: $(TEST_STAMP) ## the suites that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

# SHORT=1: some ten minutes and wider spreads. CAMPAIGNS: only these, by name.
chaos: $(TEST_STAMP) ## the campaigns on load, overload, faults and kills; hours (SHORT=1: minutes)
	$(BIN)/python -m benchmarks.chaos.all $(if $(SHORT),--short --out /tmp/astroclip-chaos) $(CAMPAIGNS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

typecheck: $(TEST_STAMP)
	$(BIN)/mypy

fast-tests: $(TEST_STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

docs: $(TEST_STAMP) ## refill the generated tables of README.md and docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/readme_tables.py

# How the shipped demo was made. Hours on two cores; every step resumes where it was stopped. Not part of any test.
SURVEY ?= data/survey
RUNS ?= runs/demo
GALAXIES ?= 60000
TRAIN := $(BIN)/astroclip train
RESULTS := benchmarks/results

demo-survey: $(TEST_STAMP) ## simulate the survey the demo model is trained on
	$(BIN)/astroclip simulate --n $(GALAXIES) --seed 1 --out $(SURVEY) --workers $(WORKERS)

demo-train: $(TEST_STAMP) ## train the demo model
	$(TRAIN) spectrum --config training/configs/demo-spectrum.toml --data $(SURVEY) --out $(RUNS)/spectrum
	$(TRAIN) image --config training/configs/demo-image.toml --data $(SURVEY) --out $(RUNS)/image
	$(TRAIN) align --config training/configs/demo-align.toml --data $(SURVEY) --out $(RUNS)/align
	$(TRAIN) align --config training/configs/demo-refine.toml --data $(SURVEY) --out $(RUNS)/refine
	$(TRAIN) align --config training/configs/demo-finish.toml --data $(SURVEY) --out $(RUNS)/finish

demo-assets: $(TEST_STAMP) ## put model and index of 8,000 training galaxies under service/demo
	mkdir -p service/demo
	cp -r $(RUNS)/finish/model/. service/demo/model/
	rm -rf $(RUNS)/embeddings service/demo/index
	$(BIN)/astroclip embed $$($(BIN)/python -m training.split $(SURVEY) --part train --shards 16) \
	    --out $(RUNS)/embeddings --model service/demo/model
	$(BIN)/astroclip index build $(RUNS)/embeddings --out service/demo/index --plain --id demo \
	    --survey "astroclip simulated survey" --previews $(SURVEY) --licence CC-BY-4.0
	$(BIN)/astroclip index lists service/demo/index

evaluate: $(TEST_STAMP) ## baselines and the science evaluation of the demo model, into benchmarks/results
	for kind in photometry redshift resnet; do \
	    $(BIN)/astroclip baseline $$kind --data $(SURVEY) --out $(RUNS)/baselines/$$kind || exit 1; done
	$(BIN)/python -m training.simulate.realism --out $(RESULTS)/realism_photometric.json
	$(BIN)/astroclip evaluate --model service/demo/model --data $(SURVEY) --out $(RESULTS)/evaluation.json \
	    --image-tower $(RUNS)/image/tower.safetensors --spectrum-tower $(RUNS)/spectrum/tower.safetensors \
	    $(foreach kind,resnet photometry redshift,--baseline $(RUNS)/baselines/$(kind)) \
	    --realism $(RESULTS)/realism_photometric.json --division closed --cache $(RUNS)/vectors \
	    $(foreach stage,spectrum image align refine finish,$(addprefix --training-log ,$(wildcard $(RUNS)/$(stage)/mllog.txt)))
	$(BIN)/astroclip benchmark check $(RESULTS)/evaluation.json $(RESULTS)/evaluation.mllog.txt
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
