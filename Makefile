VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: setup test test-oldest lint demo

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: setup
	$(BIN)/python run.py -m experiment=demo
	$(BIN)/python -m analysis.tables --table demo
	$(BIN)/python -m analysis.masks $(foreach p,attention similarity mi_attention mi,results/demo_llava/demo/$(p)/keep=16-*) --samples 6 --out docs/results/demo_masks.png
	@cat docs/results/demo.md

# The adapters on the oldest transformers that is supported; requirements.txt pins the newest.
OLDEST ?= .venv-oldest

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/test_models.py

$(OLDEST)/.installed: requirements.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -E '^(torch|accelerate|pillow|pytest|pytest-timeout)==' requirements.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/pip install -q -r $(OLDEST)/requirements.txt transformers==5.17.0
	touch $@
