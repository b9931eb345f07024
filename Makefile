# make demo: install, pretrain a small model, show a sample.    make test: install, run every test.
VENV := .venv
PYTHON ?= python3
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet -r requirements.txt
	touch $@

.PHONY: install demo test lint

install: $(VENV)/installed

demo: install
	accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain/run.py

test: install
	python -m pytest

lint: install
	ruff check .
	ruff format --check .
