# Everything here needs python3 (3.11 or later) with pip and venv, and nothing else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: help install demo test test-security test-gpu test-vllm test-cluster test-lm-eval test-openapi fuzz check bench families wheels sbom clean

help:
	@echo "make demo      split a real model and run it with a worker in a second process"
	@echo "make test      all tests, real processes and sockets"
	@echo "make test-security   attacks and faults only, with their table; SLIP_SECURITY=long for the long sizes"
	@echo "make test-gpu  what needs an NVIDIA card, on a machine with one"
	@echo "make test-vllm vLLM as the vault's engine, in an environment of its own, .venv-vllm"
	@echo "make test-cluster   splits, dealing, attacks and replicas on a Ray cluster of two nodes, in .venv-cluster"
	@echo "make test-lm-eval   lm-eval against slip serve, in an environment of its own, .venv-lm-eval"
	@echo "make test-openapi   schemathesis against slip serve, in an environment of its own, .venv-openapi"
	@echo "make fuzz SECONDS=600   each fuzz target under atheris for so long"
	@echo "make check     ruff, mypy --strict, import layers"
	@echo "make bench     what it costs on this machine"
	@echo "make families  every kind of model that transformers can build tiny: half an hour, continued where it stopped"
	@echo "make install   only make .venv        make clean   remove caches and builds"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[attacks,demo,report,dev,serve,signing,otel]'
	@touch $@

demo: $(READY)
	$(BIN)/slip demo

test: $(READY)
	$(BIN)/python tests/side_by_side.py

test-security: $(READY)
	$(BIN)/python -m pytest tests/security tests/fuzz

test-gpu: $(READY)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet triton
	$(BIN)/python -m pytest -m cuda tests/arithmetic/test_cuda.py tests/arithmetic/test_cuda_vault.py \
		tests/parties/test_worker.py tests/parties/test_card_codec.py tests/parties/test_lending.py tests/engines/test_oncard.py \
		tests/shares/test_splitter.py

VLLM := .venv-vllm

$(VLLM)/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt -e .
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/engines/test_vllm.py

CLUSTER := .venv-cluster

$(CLUSTER)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[attacks,cluster,replicas,report,dev]'
	@touch $@

test-cluster: $(CLUSTER)/.installed
	$(CLUSTER)/bin/python -m pytest tests/cluster

LM_EVAL := .venv-lm-eval

$(LM_EVAL)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]' \
		'lm-eval[api,hf]==0.4.13' hypothesis openai pytest pytest-timeout
	@touch $@

test-lm-eval: $(LM_EVAL)/.installed
	HF_HUB_OFFLINE=1 $(LM_EVAL)/bin/python -m pytest tests/serving/test_lm_eval.py

OPENAPI := .venv-openapi

$(OPENAPI)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OPENAPI)
	$(OPENAPI)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]' \
		schemathesis==4.32.5 openai peft pytest-timeout
	@touch $@

test-openapi: $(OPENAPI)/.installed
	HF_HUB_OFFLINE=1 $(OPENAPI)/bin/python -m pytest tests/serving/test_openapi.py

SECONDS ?= 600

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

BENCHES := $(filter-out bench/_% bench/families.py bench/on_vllm.py,$(sort $(wildcard bench/*.py)))

bench: $(READY)
	@set -e; for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file; done

families: $(READY)
	$(BIN)/python bench/families.py --keep .families

wheels: $(READY)
	@set -e; export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct); for one in first second; do \
		$(BIN)/python -m pip wheel --quiet --no-deps -w dist/$$one .; done; \
	cmp dist/first/*.whl dist/second/*.whl && sha256sum dist/first/*.whl

sbom: $(READY)
	$(BIN)/python -m pip install --quiet cyclonedx-bom
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o dist/sliplm.cdx.json

clean:
	rm -rf .families build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
