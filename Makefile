# On a fresh machine `make train` and `make test` are enough; `make help` lists the rest.

PYTHON ?= python3
CONFIG ?= ds_configs/default.json
ARGUMENTS ?=

RUN_DIR := runs/$(basename $(notdir $(CONFIG)))
INSTALLED := .venv/.installed
OPS_BUILT := .venv/.ops_built
TEST_OPS_BUILT := .venv/.test_ops_built
ANYWHERE := not slow and not gpu and not root

# The second stack that is supported, which GPU images carry; Triton 3.6.0's interpreter breaks on numpy 2.4.
TORCH_2_11 := .venv/torch-2.11
TORCH_2_11_PINS := torch==2.11.0 triton==3.6.0 numpy==2.3.5
PYTHON_2_11 ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo $(PYTHON))
KERNEL_TESTS := tests/kernels tests/model/test_fused_model.py

# Two tests at a time, a file on one worker, one thread each: ranks of their own wait for each other most of the time.
# Of tests marked rotate(K), whose cases are alike, these run one case in K: other ones each day.
ROTATION ?= $(shell date +%-j)
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# DeepSpeed's launcher starts ranks with the `python` it finds first, and ops are compiled by the `ninja` beside it.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup setup-eval train test test-root test-all setup-torch-2.11 test-torch-2.11 check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) $(OPS_BUILT) ## .venv with everything in it, and DeepSpeed's ops compiled

setup-eval: .venv/.eval_installed ## what the tests of evaluate --tasks need: lm-evaluation-harness, without what it does not import

train: setup ## train as CONFIG says [ds_configs/default.json], continue if begun; ARGUMENTS="--set KEY=VALUE ..."
	deepspeed launch/train.py --deepspeed_config $(CONFIG) --run_dir $(RUN_DIR) $(ARGUMENTS)
	@echo; echo "The last thing it wrote ($(RUN_DIR)/samples.txt):"; echo
	@awk '/^=== step / { entry = "" } { entry = entry $$0 "\n" } END { printf "%s", entry }' $(RUN_DIR)/samples.txt

test: setup $(TEST_OPS_BUILT) ## the tests that any machine can run, in minutes
	$(PYTEST) -m "$(ANYWHERE)" --rotation $(ROTATION)

test-root: setup $(TEST_OPS_BUILT) ## the tests that need root: two hosts, joined by ssh (apt install pdsh openssh-server iproute2)
	$(PYTEST) -m root

test-all: setup $(TEST_OPS_BUILT) ## every test that this machine can run: slow ones, on the GPU, as root
	$(PYTEST)

setup-torch-2.11: $(TORCH_2_11)/.ops_built ## a second environment: torch 2.11, triton 3.6.0 (3 GB to download)

# Of the matrix, the memory's and benchmarks.gpu's tests those marked both_stacks, which train each way once. Of the
# others, which `make test` runs on the first stack, one case in three: other ones each day.
test-torch-2.11: setup-torch-2.11 ## the kernels and each way to train, on torch 2.11 with triton 3.6.0
	env PATH="$(CURDIR)/$(TORCH_2_11)/bin:$$PATH" $(PYTEST) -m "(not slow or both_stacks) and not gpu and not root" \
	--rotation $$(($(ROTATION) + 1)) --one_case_in 3 \
	-k "both_stacks or not (test_matrix or test_memory or test_gpu_benchmark)" \
	$(KERNEL_TESTS) tests/parallel/test_internals.py tests/equality/test_matrix.py tests/planning/test_memory.py tests/benchmarks/test_wheels.py tests/benchmarks/test_gpu_benchmark.py

check: $(INSTALLED) ## lint, format, types, that imports run downward only, and plain words
	ruff check
	ruff format --check
	mypy
	lint-imports
	python -m tests.project.words

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

# The harness, what it imports at once, and what its runner of transformers models imports, which is the reference.
# `pip install lm_eval` alone brings scikit-learn, scipy and nltk for metrics of some tasks.
.venv/.eval_installed: $(INSTALLED)
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps lm_eval==0.4.13 sacrebleu==2.6.0 \
	portalocker==4.4.2 colorama==0.4.6 tabulate==0.10.0 lxml==6.1.3 accelerate==1.15.0
	@touch $@

# Needs a C++ compiler; without one the command says what is lost and succeeds, and runs use torch's own Adam.
$(OPS_BUILT): $(INSTALLED) launch/build_ops.py
	.venv/bin/python launch/build_ops.py
	@touch $@

# The op of NVMe offload, beforehand: its compiler would slow the tests beside it, some of which have deadlines.
$(TEST_OPS_BUILT): $(OPS_BUILT)
	.venv/bin/python launch/build_ops.py --deepspeed_config ds_configs/gpt3_13b_zero3_offload_nvme.json
	@touch $@

# The requirements with three other pins. PyPI's torch is a CUDA build; it also runs on a CPU.
$(TORCH_2_11)/.installed: requirements.txt
	@$(PYTHON_2_11) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	{ echo '$(PYTHON_2_11) is not 3.11 or 3.12; name another: make $(or $(MAKECMDGOALS),setup-torch-2.11) PYTHON_2_11=python3.12'; exit 2; }
	$(PYTHON_2_11) -m venv $(TORCH_2_11)
	sed -E $(foreach pin,$(TORCH_2_11_PINS),-e 's/^$(firstword $(subst ==, ,$(pin)))==[0-9.]+/$(pin)/') requirements.txt \
	> $(TORCH_2_11)/requirements.txt
	$(TORCH_2_11)/bin/python -m pip install --disable-pip-version-check --requirement $(TORCH_2_11)/requirements.txt
	@touch $@

$(TORCH_2_11)/.ops_built: $(TORCH_2_11)/.installed launch/build_ops.py
	env PATH="$(CURDIR)/$(TORCH_2_11)/bin:$$PATH" python launch/build_ops.py
	@touch $@
