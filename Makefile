# The verbs of this project. Each works on a fresh clone: it makes .venv, installs pinned dependencies and builds.
#
#   make demo      train all three stages on the embedded demo (minutes, one CPU core, no network) and write a report
#   make test      the test suite, with the CUDA kernels emulated on the CPU
#   make emulate   the op tests on the emulated kernels in three thread orders, under AddressSanitizer and UBSan
#   make fuzz      N random calls an op (default 2000) against the float64 references, every wrong call, 2^31 tokens
#   make soak      stages killed KILLS times (default 1000), checkpoints damaged in CASES ways (2000): the same bits, or a clear error;
#                  ROWS rows of users' data (20000), flawed in every way: named by line and field, or read
#   make bench     the ops beside their peers, as ratios of one run; JSON in bench/results/
#   make hacking   reward hacking provoked on three seeds, and the guard that has to stop it; five CPU-minutes
#   make peers     a PPO update beside TRL 1.12's, which gets an environment of its own under build/peers; after it, `make bench`
#                  has more contenders
#   make parity    every function that rlhf_fast.patch replaces beside the library's own, each library in an environment under build/peers;
#                  NEMO_RL=CHECKOUT adds NeMo-RL
#   make gpu       on a machine with an NVIDIA GPU: build, CUDA tests, compute-sanitizer, benchmarks; nine minutes
#   make machine-code   registers, spills, occupancy and 16-byte loads of every CUDA kernel and architecture; needs nvcc, no GPU
#   make wheel     wheels for every CPython from 3.10 to 3.14 that is found, and a source archive, in dist/; needs no CUDA toolkit
#   make matrix    these wheels in fresh environments with torch 2.10, 2.13 and the newest: one table; gigabytes of downloads
#   make lint      ruff

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
N ?= 2000
KILLS ?= 1000
CASES ?= 2000
ROWS ?= 20000
# On machines without a GPU one architecture is enough to prove that the CUDA sources compile.
export TORCH_CUDA_ARCH_LIST ?= $(if $(wildcard /dev/nvidia0),,9.0)
export OMP_NUM_THREADS ?= 2

.PHONY: demo test emulate fuzz soak bench hacking peers parity gpu machine-code wheel matrix lint clean install
.DELETE_ON_ERROR:

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed pyproject.toml setup.py $(wildcard csrc/*)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

install: $(VENV)/built

demo: install
	$(VENV)/bin/rlhf-fast demo

test: install
	$(PY) -m pytest

emulate: install
	for order in forward reverse shuffled; do \
	  CUDA_ON_CPU_ORDER=$$order RLHF_FAST_FUZZ=40 RLHF_FAST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(PY) -m pytest tests/test_*.py -k emulated || exit 1; \
	done

fuzz: install
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(N)
	RLHF_FAST_BAD_CALLS=all RLHF_FAST_SLOW=1 $(PY) -m pytest tests/test_bad_calls.py tests/test_contract_table.py \
	  -k "wrong_calls or more_tokens and not emulated"

soak: install
	$(PY) -m tests.train.kill --kills $(KILLS)
	$(PY) -m tests.train.damage --cases $(CASES)
	OMP_NUM_THREADS=1 $(PY) -m tests.train.bad_rows --rows $(ROWS)

bench: install
	$(PY) -m pytest bench -c bench/pytest.ini --benchmark-json=bench/results/last.json --benchmark-quiet
	$(PY) -m bench.report bench/results/last.json

hacking: install
	OMP_NUM_THREADS=1 $(PY) -m tests.hacking

build/peers/%/installed: bench/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	if [ -e $(<:.txt=.no-deps.txt) ]; then $(@D)/bin/python -m pip install -q --no-deps --no-build-isolation -r $(<:.txt=.no-deps.txt); fi
	if [ $* = nemo-rl ]; then $(@D)/bin/python -m pip install -q --no-deps --ignore-requires-python -e $(NEMO_RL); fi
	touch $@

build/peers/ops/installed: bench/peers/ops.txt $(VENV)/installed
	$(PY) -m pip install -q --no-deps --upgrade --target $(@D) -r $<
	touch $@

peers: install build/peers/trl-1.12/installed build/peers/trl-1.16/installed build/peers/verl-0.9/installed build/peers/ops/installed
	$(PY) -m bench.ppo_update
	$(PY) -m bench.linear_peers
	$(PY) -m bench.swap_in_trl

# The environments that tests/adapters/parity.py knows. NEMO_RL is a checkout of NeMo-RL, which is on no index.
PARITY := trl-1.12 trl-1.16 trl-1.16-triton verl-0.9 openrlhf-0.11 $(if $(NEMO_RL),nemo-rl)
parity: install $(PARITY:%=build/peers/%/installed)
	$(PY) -m tests.adapters.parity $(PARITY)

gpu: install
	$(PY) -m bench.gpu

machine-code: install
	$(PY) -m bench.machine_code

wheel:
	$(PYTHON) -m release.wheel

matrix:
	$(PYTHON) -m release.matrix

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf build dist *.egg-info $(VENV)/built rlhf_fast/_C*.so
