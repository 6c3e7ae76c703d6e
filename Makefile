# biscale-env: two commands are enough on a fresh machine: `make compare` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SHELL  := /bin/bash

.PHONY: compare test test-slow test-all test-oldest test-python test-rllib coverage mutation lint types bench bench-hardware bench-cluster fit install docs docs-site tables test-engine clean

compare: $(READY)            ## the main job on the embedded default scenario
	$(BIN)/biscale compare

test: $(READY)               ## all fast tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu and not engine"

test-slow: $(READY)          ## the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow and not gpu and not engine"  # what runs in real time is one group

test-all: test test-slow

# Without torch: the base install has to work by itself. Another interpreter, or the oldest dependencies.
ROW_EXTRAS := hw,notebooks,marl,offline,test
OTHER_PYTHON ?= python3.13

test-oldest:                 ## the fast tests on the oldest dependencies that pyproject.toml allows
	$(call row,.venv-oldest,$(PYTHON),constraints-oldest.txt)

test-python:                 ## the fast tests on another Python: make test-python OTHER_PYTHON=python3.13
	$(call row,.venv-python,$(OTHER_PYTHON),constraints.txt)

coverage: $(READY)           ## the fast tests, with the lines of Python that they run (kernels are compiled and do not count)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu and not engine" \
	  --cov=biscale_env --cov=controllers --cov=agents --cov-report=term:skip-covered

mutation:                    ## a sample of mutants of the parts that matter most; hours, NAMES="stats loop" SAMPLE=60
	$(PYTHON) -m venv .venv-mutation
	.venv-mutation/bin/python -m pip install --quiet -c constraints.txt -e ".[hw,mutation]"
	.venv-mutation/bin/python tests/mutation/mutate.py $(NAMES) --sample $(or $(SAMPLE),60)

test-rllib:                  ## the environments under RLlib, which pins a Gymnasium of its own
	$(PYTHON) -m venv .venv-rllib
	.venv-rllib/bin/python -m pip install --quiet -e ".[rllib,test]"
	.venv-rllib/bin/python -m pytest -q tests/envs/test_envs_rl_libraries.py -k rllib

define row
	$(2) -m venv $(1)
	$(1)/bin/python -m pip install --quiet -c $(3) -e ".[$(ROW_EXTRAS)]"
	$(1)/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu and not engine"
endef

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)              ## every speed metric with its target and ratio
	@mkdir -p runs
	$(BIN)/python -m pytest -q benchmarks -m "not cluster and not hardware" --benchmark-json=runs/bench.json --benchmark-columns=min,median,rounds

bench-hardware: $(READY)     ## the hook, and the closed loop on emulated engines in real time; wants a quiet machine
	@mkdir -p runs
	$(BIN)/python -m pytest -q benchmarks -m hardware --benchmark-json=runs/bench-hardware.json --benchmark-columns=min,median,rounds

bench-cluster: $(READY)      ## the same for the cluster, tier 1, a day and the quick headline experiment (minutes)
	@mkdir -p runs
	$(BIN)/python -m pytest -q benchmarks -m cluster --benchmark-json=runs/bench-cluster.json --benchmark-columns=min,median,rounds

fit: $(READY)                ## regenerate the shipped models from kernel tables and evidence (minutes)
	$(BIN)/biscale fit

docs: $(READY)               ## regenerate the figures of README and docs that need no long experiment
	$(BIN)/python docs/update.py

SITE_EXTRAS := rl,render,hw,marl,tables,notebooks,site

docs-site:                   ## the documentation as a site in site/, read from files, notebooks executed (minutes); warnings fail
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install --quiet -c constraints.txt -e ".[$(SITE_EXTRAS)]"
	.venv-site/bin/python -m mkdocs build --strict

EXPERIMENTS := main delay caps slo members ablation mismatch

tables: $(READY)             ## the main experiments and their tables; over an hour on two cores, resumes where it was broken off
	$(BIN)/biscale traces fetch azure-conv-2023 azure-code-2023
	set -e; for name in $(EXPERIMENTS); do \
	  $(BIN)/biscale compare --experiment $$name --resume --out runs/tables-$$name; \
	  $(BIN)/python docs/update.py experiment:$$name=runs/tables-$$name; done

test-engine:                 ## a real vLLM prefill/decode pair on CPU, in an environment of its own
	bash tests/engine/run.sh

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-oldest .venv-python .venv-mutation .venv-site site .mkdocs-jupyter build dist *.egg-info
