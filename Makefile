# Everything sets itself up: a virtual environment in .venv and the dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= configs/angular_digits.yaml
SEEDS ?= 1 2 3

.DEFAULT_GOAL := help
.PHONY: help quickstart test check debian format bench chaos clean

help:
	@echo "make quickstart   install, then run a real sweep on handwritten digits (a few minutes on two cores)"
	@echo "make test         install, then formatter, linter, types and the whole test suite"
	@echo "make bench        every benchmark, as ratios, into tests/benchmarks/RESULTS.md (under 20 minutes on two cores)"
	@echo "make chaos        one sweep per seed (SEEDS=\"1 2 3\") on hosts that are killed under it; root, Linux"
	@echo "make format       format the code"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

# Hosts out of namespaces need sshd and rsync. Without them their tests are skipped, and say so.
debian:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! which sshd rsync ip ssh > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 rsync > /dev/null \
		|| echo "no Debian packages: tests of clusters will be skipped"; \
	fi

quickstart: $(VENV)/.installed
	$(BIN)/stillhouse run $(EXPERIMENT)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check debian
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/bench.py

chaos: $(VENV)/.installed-dev
	$(BIN)/python tests/cluster/chaos_loop.py --seeds $(SEEDS)

clean:
	rm -rf $(VENV) build *.egg-info
