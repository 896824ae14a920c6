# fastbyol: `make` lists the targets. Each one installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OLDEST := .venv-oldest
DEMO_KIND ?= fashion
DEMO_DATA := demo/$(DEMO_KIND)
DEMO_RUN := runs/demo
DEMO_PRESET := $(if $(filter scenes,$(DEMO_KIND)),cpu_demo_scenes,cpu_demo)

.PHONY: help install demo test test-oldest lint docs docs-serve bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## .venv with torch, DALI, ffcv and the tools; Debian packages where apt-get can install them

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/install.sh

demo: $(STAMP) ## images -> .beton -> BYOL -> evaluation -> runs/demo/report.html (DEMO_KIND=fashion or scenes)
	BIN=$(BIN) KIND=$(DEMO_KIND) DATA=$(DEMO_DATA) RUN=$(DEMO_RUN) PRESET=$(DEMO_PRESET) bash scripts/demo.sh

test: $(STAMP) ## the tests, in two processes: most of them wait for processes of their own
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-oldest: ## the tests with the lowest versions that pyproject.toml allows, in an environment of its own (OLDEST=.venv-oldest)
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) scripts/lowest_versions.py > $(OLDEST)/lowest.txt
	PKG_CONFIG_PATH="$(CURDIR)/scripts/ffcv_build/pc:$$PKG_CONFIG_PATH" $(OLDEST)/bin/python -m pip install --quiet \
	  --constraint $(OLDEST)/lowest.txt --editable '.[dev,dali,ffcv]'
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) ## ruff, pyright, layers, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

docs: $(STAMP) ## the documentation as a site, in site/; fails on a dead link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(STAMP) ## the same, shown at http://127.0.0.1:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(STAMP) ## the benchmark suite (quick)
	$(BIN)/python -m benchmarks.run --quick

clean: ## remove the demo's data and runs
	rm -rf demo runs/demo site
