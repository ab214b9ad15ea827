# make quickstart   the whole line on a synthetic shop; needs Python 3.11 to 3.13 and nothing else
# make test         the tests, with coverage        make test-slow   those that take longer
# make lint         ruff and mypy                   make lock        resolve constraints.txt anew

# The newest Python that runs: a version manager's shim may exist and fail.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
EXTRAS := tpu gpu spark bigquery gcs s3 beam lora export test bench

.PHONY: quickstart test test-slow lint lock clean

quickstart: .venv/installed
	$(BIN)/calrec quickstart

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term

test-slow: .venv/installed-slow .venv-peers/installed
	CALREC_PEERS_PYTHON=$(CURDIR)/.venv-peers/bin/python PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m pytest -m slow --durations=0 -p no:cacheprovider

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# t5x is left out: it is installed from git and pins nothing.
lock: .venv/installed
	$(BIN)/python -m pip install uv
	$(BIN)/uv pip compile --universal --fork-strategy fewest --python-version 3.11 --no-annotate --no-header --upgrade \
		$(addprefix --extra ,$(EXTRAS)) setup.py -o constraints.txt

clean:
	rm -rf .venv .venv-peers build dist *.egg-info

# pip comes last, so an interrupted venv is made again.
.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 with venv was found; name one by make PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip setup.py constraints.txt
	$(PIP) -e .
	touch $@

.venv/installed-test: .venv/bin/pip setup.py constraints.txt
	$(PIP) -e '.[test]'
	touch $@ .venv/installed

# The TPU's compiler, Spark, and a peer of the metrics; the browser's tests take Chromium, too.
.venv/installed-slow: .venv/installed-test
	$(PIP) -e '.[test,tpu,spark]' ranx
	touch $@

# torch and transformers, which open models are compared with: gigabytes, and in no process with JAX.
.venv-peers/installed: .venv/bin/pip constraints.txt
	$(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -c constraints.txt torch transformers numpy
	touch $@
