# On a fresh machine `make train` and `make test` are enough; `make help` lists the rest.

PYTHON ?= python3
CONFIG ?= ds_configs/default.json
ARGUMENTS ?=

RUN_DIR := runs/$(basename $(notdir $(CONFIG)))
INSTALLED := .venv/.installed
OPS_BUILT := .venv/.ops_built
TEST_OPS_BUILT := .venv/.test_ops_built
ANYWHERE := not slow and not gpu and not root

# The oldest Triton that the kernels run on, laid over the environment; its interpreter breaks on numpy 2.4.
OLDEST_TRITON := .venv/triton-3.6.0
KERNEL_TESTS = $(shell grep --files-with-matches -e fused_device -e kernels.compile_ahead tests/test_*.py)

# Two tests at a time, a file on one worker, one thread each: ranks of their own wait for each other most of the time.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# DeepSpeed's launcher starts ranks with the `python` it finds first, and ops are compiled by the `ninja` beside it.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-root test-all test-oldest-triton check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) $(OPS_BUILT) ## .venv with everything in it, and DeepSpeed's ops compiled

train: setup ## train as CONFIG says [ds_configs/default.json], continue if begun; ARGUMENTS="--set KEY=VALUE ..."
	deepspeed launch/train.py --deepspeed_config $(CONFIG) --run_dir $(RUN_DIR) $(ARGUMENTS)
	@echo; echo "The last thing it wrote ($(RUN_DIR)/samples.txt):"; echo
	@awk '/^=== step / { entry = "" } { entry = entry $$0 "\n" } END { printf "%s", entry }' $(RUN_DIR)/samples.txt

test: setup $(TEST_OPS_BUILT) ## the tests that any machine can run, in minutes
	$(PYTEST) -m "$(ANYWHERE)"

test-root: setup $(TEST_OPS_BUILT) ## the tests that need root: two hosts, joined by ssh (apt install pdsh openssh-server iproute2)
	$(PYTEST) -m root

test-all: setup $(TEST_OPS_BUILT) ## every test that this machine can run: slow ones, on the GPU, as root
	$(PYTEST)

test-oldest-triton: $(OLDEST_TRITON) ## the kernels' tests on Triton 3.6, the oldest that they run on
	PYTHONPATH=$(OLDEST_TRITON) $(PYTEST) -m "$(ANYWHERE)" $(KERNEL_TESTS)

check: $(INSTALLED) ## lint, format, types, and that imports run downward only
	ruff check
	ruff format --check
	mypy
	lint-imports

bench: setup ## time each kernel against torch's own; tables go to runs/benchmark
	python -m kernels.benchmark --output runs/benchmark

clean: ## remove the environment and the tools' caches; never data/ or runs/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo '$(PYTHON) is missing or older than 3.11; name another: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12'; exit 2; }
	@$(PYTHON) -m venv .venv || \
	{ echo '$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)'; exit 2; }
	.venv/bin/python -m pip install --disable-pip-version-check --requirement requirements.txt
	@touch $@

# Needs a C++ compiler; without one the command says what is lost and succeeds, and runs use torch's own Adam.
$(OPS_BUILT): $(INSTALLED) launch/build_ops.py
	.venv/bin/python launch/build_ops.py
	@touch $@

# The op of NVMe offload, beforehand: its compiler would slow the tests beside it, some of which have deadlines.
$(TEST_OPS_BUILT): $(OPS_BUILT)
	.venv/bin/python launch/build_ops.py --deepspeed_config ds_configs/gpt3_13b_zero3_offload_nvme.json
	@touch $@

$(OLDEST_TRITON): $(INSTALLED)
	rm -rf $@
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps --target $@ triton==3.6.0 numpy==2.3.5
	@touch $@
