# First use of any target sets up .venv from requirements.lock.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/smoke
CHAOS ?= runs/chaos
ISA_TESTS := $(addprefix tests/,titan_ext/test_contracts.py titan_ext/test_attention.py titan_ext/test_qat.py \
	eval/test_int4.py eval/test_device_op.py)

ARM_CXX ?= aarch64-linux-gnu-g++

.PHONY: setup runtimes smoke device-bench chaos fuzz newest test test-clusters test-parts test-isa lint

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Programs of others that tests run: transformers 5, mlx-lm, compressed-tensors, llama.cpp, which is compiled, and
# ExecuTorch for ARM. Without them these tests are skipped.
runtimes: $(patsubst tests/runtimes/%.txt,.runtimes/%/.installed,$(wildcard tests/runtimes/*.txt))

.runtimes/executorch_aarch64/.installed: private PIP_OPTIONS = --platform manylinux_2_28_aarch64 \
	--python-version 3.11 --only-binary :all:

.runtimes/%/.installed: tests/runtimes/%.txt | setup
	rm -rf .runtimes/$*
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(PIP_OPTIONS) --target .runtimes/$* -r $<
	touch $@

smoke: setup
	$(BIN)/mobilemoe run smoke --out $(RUN)

# A static program for a phone, and the shapes that it measures (docs/on_device.md).
device-bench: setup
	$(BIN)/python -m eval.device.phone_bench build --compiler "$(ARM_CXX)" --out $@

# Every fault of tests/faults, one after the other, and a whole run on Ray that is disturbed 30 times: some hours. It goes
# on where it was stopped, and writes its table while it tries them. As root it also fills disks (docs/reliability.md).
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.chaos --work $(CHAOS) --random 30

# Hostile input to every reader, some hours (docs/security.md). `make fuzz INPUTS=1000` takes fewer.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzz --inputs $(or $(INPUTS),100000)

# The newest version of every dependency against the contract tests (docs/supply.md): half an hour or more.
newest: setup
	@$(BIN)/python -m tests.supply.newest --work .newest

# Tests that start clusters and whole runs wait more than they compute, so they run beside the others; theirs is the
# report that comes in one piece. `python -m pytest` runs all of them one after the other.
test: setup
	@$(MAKE) --no-print-directory --jobs=2 test-clusters test-parts

test-clusters: setup
	@$(BIN)/python -m pytest tests/e2e tests/faults tests/pipelines tests/slurm >$(VENV)/$@.log 2>&1; code=$$?; cat $(VENV)/$@.log; exit $$code

test-parts: setup
	@$(BIN)/python -m pytest tests/test_*.py tests/core tests/data tests/eval tests/fuzz tests/supply tests/titan_ext

# The tests that compare kernels, bits or block sizes, once more under a second instruction set: AVX2 on a processor with
# AVX-512, SSE 4.1 on another. Libraries take other code paths there.
test-isa: setup
	@if grep -qw avx512f /proc/cpuinfo; then export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2; \
	else export ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default; fi; \
	$(BIN)/python -m pytest $(ISA_TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
