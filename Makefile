VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: setup test lint demo

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
