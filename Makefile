# Every target sets up what it needs in .venv; nothing else is required but Python 3.10+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup demo experiment-extra-merge experiment-svc test test-slow test-gpu check format
.PHONY: bench bench-plan bench-svc clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo train
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 -m distmerge merge configs/average.yaml runs/demo/merged --overwrite
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 -m distmerge merge configs/extra_merge.yaml runs/demo/extrapolated --overwrite
	$(BIN)/python -m benchmarks.demo evaluate

# Takes over an hour of one core. What is done is kept in runs/experiment-extra-merge: an interrupted run goes on.
experiment-extra-merge: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.experiment_extra_merge

# Takes about an hour of one core, and Debian's dataset-fashion-mnist and packages of texts (benchmarks/svc_inputs.sh).
experiment-svc: setup
	benchmarks/svc_inputs.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.experiment_svc

test: setup
	$(BIN)/python -m pytest

# The fuzzer is not for every machine; without it its tests say that they are skipped.
test-slow: setup
	-$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	benchmarks/mergekit_env.sh
	$(BIN)/python benchmarks/bench_average.py
	$(BIN)/python -m benchmarks.bench_extra_merge
	$(BIN)/python -m benchmarks.bench_journal
	$(BIN)/python -m benchmarks.bench_ties

bench-plan: setup
	$(BIN)/python benchmarks/bench_plan.py

# Its peer gets an environment of its own.
bench-svc: setup
	benchmarks/fusion_bench_env.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_svc

clean:
	rm -rf $(VENV) .venv-mergekit .venv-fusion-bench runs
