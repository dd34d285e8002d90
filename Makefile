# Every target sets up .venv itself, on a machine that has only python3 (3.11 or newer), pip and make.
PYTHON ?= python3
export PYTHON
# With this set, as some sandboxes have it, each process compiles torch and Ray anew: 2x slower imports.
unexport PYTHONDONTWRITEBYTECODE

# Two processes fill two cores: most tests use one. A file's tests stay together; the longest files come first.
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder

# All but tests/gpu is about CPUs: where there is a GPU, its two ranks would want two.
ON_CPU = CUDA_VISIBLE_DEVICES=

.PHONY: help env demo test gpu long faults slurm lint clean

help:
	@echo "make env    install everything into .venv"
	@echo "make demo   every strategy on digits, in minutes, offline"
	@echo "make test   the tests"
	@echo "make gpu    what only a GPU can show: kernels, loaders, engines, compiled runs"
	@echo "make long   the tests in every combination, and those that wait for minutes: an hour or more"
	@echo "make faults break runs in every way, ten times each, and compare their bits: an hour or more"
	@echo "make slurm  jobs on a two-node Slurm cluster, with time limits and lost nodes: ten minutes"
	@echo "make lint   ruff and pyright"
	@echo "make clean  remove .venv and caches; runs/ stays"

env: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@.ci/install

demo: env
	.venv/bin/tldist demo

test: env
	$(ON_CPU) .venv/bin/python -m pytest -q $(SIDE_BY_SIDE)

gpu: env
	@.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no GPU here")'
	.venv/bin/python -m pytest -q tests/gpu

long: env
	$(ON_CPU) TLDIST_LONG=1 .venv/bin/python -m pytest -q $(SIDE_BY_SIDE)

faults: env
	$(ON_CPU) .venv/bin/python tests/faults/harness.py

slurm: env
	$(ON_CPU) TLDIST_LONG=1 .venv/bin/python -m pytest -q tests/slurm

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
