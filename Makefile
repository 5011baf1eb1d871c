# The commands of this project.  `make demo` and `make test` do all their set-up themselves.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all lint check chaos bench dist screenshots clean

demo: $(VENV)/.runtime  ## a web service through a relay on this machine; ONCE=1 ends after one fetch
	$(RUN) deploy/demo.py $(if $(ONCE),--once)

test: $(VENV)/.test  ## the fast tests, and those with real peers where the programs are installed
	$(RUN) -m pytest $(ARGS)

test-all:  ## the tests on every Python from 3.10 to 3.15 that is installed, free-threaded ones too
	@found=0; for version in 3.10 3.11 3.12 3.13 3.14 3.15 3.13t 3.14t 3.15t; do \
	  python$$version -c '' 2>/dev/null || continue; found=1; echo "== Python $$version"; \
	  $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=python$$version || exit 1; \
	done; [ $$found = 1 ] || { echo "no Python from 3.10 to 3.15 found"; exit 1; }

lint: $(VENV)/.lint  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check: lint test  ## ruff, mypy --strict and the tests

chaos: $(VENV)/.test  ## faults, load and hostile input, as root on Linux, over an hour; ARGS="--scale 0.05" is a quick look
	$(RUN) -m tests.chaos $(ARGS)

bench: $(VENV)/.test  ## speed and memory beside other relays, up to three hours; ARGS="--repeat 1 --seconds 1" is a quick look
	$(RUN) -m tests.bench $(ARGS)

dist: $(VENV)/.runtime  ## dist/tcprelays, dist/tcprelayc and dist/tcprelay, one executable file each, and the wheel
	$(RUN) deploy/make_dist.py

screenshots: $(VENV)/.test  ## docs/status*.png, of a relay on this machine, in five minutes; needs chromium and its driver
	$(RUN) deploy/screenshots.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-* dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check ruff mypy
	touch $@
