# Every target prints the plain commands that it runs; README.md lists them for people without make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo app test test-all faults matrix
.DEFAULT_GOAL := demo

demo: .venv/installed
	$(BIN)/python train.py --preset smoke --dataset digits

app: .venv/installed $(patsubst %/model.safetensors,%/learner.pkl,$(wildcard results/*/model.safetensors))
	$(BIN)/python app.py

results/%/learner.pkl: results/%/model.safetensors results/%/metrics.json | .venv/installed
	$(BIN)/python export.py $(@D)

test: .venv/installed-dev
	$(BIN)/python -m bench.suite

test-all: .venv/installed-dev
	$(BIN)/python -m bench.suite --cov --cov-fail-under 95 -m "slow or not slow" --ignore tests/faults

faults: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests/faults

matrix: .venv/installed
	$(BIN)/python -m bench.matrix

.venv/bin/pip:
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('sifar needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
