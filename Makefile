# The everyday commands. `make help` lists them.
PYTHON ?= $(shell for name in python3.11 python3; do \
	"$$name" -c "" 2>/dev/null && echo "$$name" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# One thread per process: two processes with one thread each beat one process with two.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults lint export lab docs bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Made when it is missing, and brought up to date when the declared or pinned dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
		echo "make: PYTHON='$(PYTHON)': expected Python 3.11 or newer, found $$("$(PYTHON)" --version 2>&1 | tail -n 1);" \
			"install Python 3.11 or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

# Only the book needs mkdocs; `make test` does without.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## train the whole pipeline on synthetic data, in a fresh folder under demo_run/
	@folder=demo_run/$$(date +%Y-%m-%d_%H-%M-%S) && mkdir -p "$$folder" && cd "$$folder" && \
		echo "make demo: all files go to $$folder" && "$(CURDIR)/$(BIN)/topoqa" pipeline

test: lint ## lint, run every page, run the tests
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-faults: $(STAMP) ## kill at changes of the file system and go on; damage every file that is read; lose nodes; hours; FIRST=1 kills elsewhere
	TOPOQA_KILL_EVERY=1 TOPOQA_KILL_FIRST=$(or $(FIRST),0) TOPOQA_DAMAGE_EVERY=1 TOPOQA_BENCHMARKS=all TOPOQA_CLUSTER=all $(BIN)/python -m pytest -n 2 --dist loadgroup tests/test_kills.py tests/test_kills_of_commands.py tests/test_kills_of_trainings.py tests/test_damage.py tests/test_benchmarks.py tests/test_ray_commands.py

lint: $(STAMP) ## check that pages, package and formatting agree
	@$(BIN)/python .ci/lint.py

export: $(STAMP) ## format and clean the notebooks, export the package from them
	$(BIN)/ruff format --quiet nbs pipelines tests scripts benchmarks docs .ci
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname pipelines
	$(BIN)/nbdev_export

bench: $(STAMP) ## the timed comparisons of benchmarks/; DATA=folder adds its graphs, train.csv and val.csv
	$(BIN)/python benchmarks/epoch.py $(if $(DATA),--data "$(DATA)")
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/sweep.py $(if $(DATA),--data "$(DATA)")
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/predict.py $(if $(DATA),--data "$(DATA)/graphs")
	$(BIN)/python benchmarks/answer.py $(if $(DATA),--data "$(DATA)")

# JupyterLab enters its kernel's name and version in every page it opens, and saves that; what is saved is cleaned first.
lab: $(STAMP) ## open the pages in JupyterLab
	cd nbs && "$(CURDIR)/$(BIN)/jupyter" lab --FileContentsManager.pre_save_hook=nbdev.clean.clean_jupyter

docs: $(DOCS_STAMP) ## the pages as a book with search, in _docs/; no network is needed to read it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "make docs: open _docs/index.html"
