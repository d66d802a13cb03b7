# Each command makes .venv when it is missing, installs what is missing under requirements.lock, and goes on.
# Another Python:                make demo PYTHON=python3.12
# A smaller torch without CUDA:  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := dev,encoders,augmentation,voila,cluster,docs,grib
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

.PHONY: help demo test bench faults lab docs install lock

help:
	@echo "make demo   train a wildfire forecast on simulated fires, score it and draw it on a map"
	@echo "make test   run every notebook and every test"
	@echo "make bench  measure speed and memory beside plain implementations"
	@echo "make faults kill, damage, attack and starve it, at full size"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make docs   build the documentation site into _site"

demo: $(STAMP)
	$(BIN)/geoforecast run fire --name demo

test: $(STAMP)
	$(BIN)/python tests/run.py

bench: $(STAMP)
	$(BIN)/python tests/bench

faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults --many -n 2 --dist loadfile

lab: $(STAMP)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb $(LAB)

docs: $(STAMP)
	$(BIN)/python tools/build_docs.py

install: $(STAMP)

$(STAMP): settings.ini requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed and was not found; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: torch first, then the rest (a few minutes)"
	$(BIN)/python -m pip install -c requirements.lock torch
	$(BIN)/python -m pip install -c requirements.lock -e '.[$(EXTRAS)]'
	@touch $@

# The newest versions that fit settings.ini, written down as the tested ones; run `make test` before committing them.
lock:
	rm -rf .venv/lock && $(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install -q torch==2.13.0
	.venv/lock/bin/python -m pip freeze | grep '^torch==' > .venv/lock/torch.txt
	.venv/lock/bin/python -m pip install -q -c .venv/lock/torch.txt '.[$(EXTRAS),wandb]'
	{ grep '^#' requirements.lock; .venv/lock/bin/python -m pip freeze | grep -v '^geoforecast' | sed 's/+cpu$$//'; } > .venv/lock/requirements.lock
	mv .venv/lock/requirements.lock requirements.lock && rm -rf .venv/lock
