# Two commands: `make demo` and `make test`. Each makes .venv on first use.
# PYTHON=python uses your own environment instead.

PY ?= python3
ifdef PYTHON
RUN := $(PYTHON)
READY := .installed-for-$(subst /,_,$(PYTHON))
# An environment that uv made has no pip.
INSTALL = install() { \
    if $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m pip install -q -e "$$1"; \
    else uv pip install -q --python $(PYTHON) -e "$$1"; fi; }; install
else
RUN := .venv/bin/python
READY := .venv/.ready
# uv is quicker where it can be had; pip alone reads pip.conf.
INSTALL = .venv/bin/python -m uv pip install -q --python .venv/bin/python -e
endif

.PHONY: help demo test test-all check clean

help: ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## train a small 3D CNN on the built-in videos and test it; 2 minutes on 2 cores
	$(RUN) -m vidtrain train experiment=demo

# A file's tests stay in one process: several share what is made once.
test: $(READY)-dev ## the default tests: CPU, no network
	$(RUN) -m pytest -n auto --dist loadfile

test-all: $(READY)-dev ## the slow tests too
	$(RUN) -m pytest -m ''

check: $(READY)-dev ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean: ## everything that the other targets made, but not runs/ and data/
	rm -rf .venv .installed-for-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "vidtrain needs Python 3.10 or newer; name one: make PY=/path/to/python3.12"; exit 1; }
	@$(PY) -m venv .venv \
	  || { rm -rf .venv; echo "no venv module (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	-@.venv/bin/python -m pip install -q uv

.venv/.ready: pyproject.toml | .venv/bin/python
	@$(INSTALL) . || .venv/bin/python -m pip install -q -e .
	@touch $@

.venv/.ready-dev: pyproject.toml | .venv/bin/python
	@$(INSTALL) '.[dev]' || .venv/bin/python -m pip install -q -e '.[dev]'
	@touch $@ .venv/.ready

.installed-for-%-dev: pyproject.toml
	@$(INSTALL) '.[dev]'
	@touch $@

.installed-for-%: pyproject.toml
	@$(INSTALL) .
	@touch $@
