# Everything a fresh machine needs is python3 (3.11 or newer) with pip or venv, and make. Each target installs what it needs.

# deepspeed looks for ninja there when it builds an operator
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# one thread for each process: several processes share the cores, and results do not depend on how many there are
export OMP_NUM_THREADS ?= 1
# else each process would compile torch and timm anew, which takes 10 s
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
# processes that share the tests; each needs 2 GB
WORKERS ?= 2
CODE := selfmask_dist launchers data_prep benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-slow check wheel-test format slurm-up slurm-down clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## learn a mask on real scanned digits with two processes; ends with a picture
	.venv/bin/selfmask demo

# worksteal: neighbours stay together, so most fixtures of a module are made once, and no worker waits for the other
PYTEST := .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

test: .venv/.installed  ## unit and distributed tests, without the slow ones (8 to 10 minutes on two cores)
	$(PYTEST) $(PYTEST_ARGS)

test-all: .venv/.installed  ## all tests
	$(PYTEST) --slow $(PYTEST_ARGS)

# continuous integration has time for a part of them, and takes another part with each commit
test-slow: .venv/.installed  ## the slow tests alone: as many as begin within MINUTES=10
	$(PYTEST) --slow -m slow --minutes=$(or $(MINUTES),10) \
	  --begin-at=$(shell git rev-list --count HEAD 2>/dev/null || echo 0) $(PYTEST_ARGS)

# The tests are not repeated here: `.ci/run` calls `make test` and then `make check`.
check: .venv/.installed  ## formatter, linter and types
	.venv/bin/ruff format --check $(CODE)
	.venv/bin/ruff check $(CODE)
	.venv/bin/mypy

format: .venv/.installed  ## rewrite the code as `make check` wants it
	.venv/bin/ruff format $(CODE)
	.venv/bin/ruff check --fix $(CODE)

wheel-test: .venv/.installed  ## build the wheel, install it into an empty environment, and use it there
	.ci/wheel-test

slurm-up: .venv/.installed  ## a SLURM of four virtual nodes on this machine (root; needs slurm-wlm and munge)
	.venv/bin/python -m tests.support.slurm up

slurm-down: .venv/.installed  ## stop it
	.venv/bin/python -m tests.support.slurm down

clean:  ## remove the environment, caches and builds (runs are kept)
	rm -rf .venv .uv build dist .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs in seconds what pip installs in minutes. Where it is missing, pip (or else a private environment's pip) puts
# it into .uv, so nothing outside this folder changes. Where there is no home to keep uv's cache in, it is kept there too.
# Certificates are the system's, as pip's are: a company's proxy may bring its own.
# deepspeed's build asks `bash` for the type of a command, which sh knows as well.
.venv/.installed: pyproject.toml constraints.txt
	@set -eu; \
	python=; \
	for candidate in $(PYTHON) python3.13 python3.12 python3.11; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$($$candidate -c 'import sys; print(sys.executable)'); break; \
	  fi; \
	done; \
	[ -n "$$python" ] || { echo "No Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }; \
	uv=uv; \
	if ! uv --version >/dev/null 2>&1; then \
	  uv=.uv/bin/uv; \
	  [ -x $$uv ] \
	    || "$$python" -m pip install --quiet --target .uv uv \
	    || { "$$python" -m venv .uv && .uv/bin/python -m pip install --quiet uv; } \
	    || { echo "Could not install uv: python3 needs pip or venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi; \
	cache=$${XDG_CACHE_HOME:-$${HOME:-/nowhere}/.cache}; \
	mkdir -p "$$cache/uv" 2>/dev/null && [ -w "$$cache/uv" ] || export UV_CACHE_DIR="$${UV_CACHE_DIR:-.uv/cache}"; \
	[ -x .venv/bin/python ] || $$uv venv --python "$$python" .venv; \
	for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do \
	  [ ! -r $$bundle ] || export UV_SYSTEM_CERTS="$${UV_SYSTEM_CERTS:-1}"; \
	done; \
	if ! command -v bash >/dev/null; then \
	  mkdir -p .uv/shims; \
	  printf '#!/bin/sh\nexec /bin/sh "$$@"\n' >.uv/shims/bash; \
	  chmod +x .uv/shims/bash; \
	  export PATH="$(CURDIR)/.uv/shims:$$PATH"; \
	fi; \
	$$uv pip install --python .venv/bin/python --editable '.[dev]' --constraints constraints.txt; \
	touch $@
