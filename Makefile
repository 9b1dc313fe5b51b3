# Everything that this project does from a fresh clone. Needed: make and Python 3.11 or newer.
PYTHON ?= python3
# Options for book/build.py, for instance BOOK="--only train", BOOK="--params params/ci", or none: BOOK=,
# by which chapters run with their own parameters, half an hour and more.
BOOK ?= --params params/book
# Options for pytest: two files of tests at a time; TESTS= for one, as timings and debuggers like it.
TESTS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Options for snakemake, for instance GRID="--config seeds=[0]" or GRID=-n.
GRID ?=
# Settings of `make prior`, for instance CONFIG="seeds=[0]"; GRID_NAME=default for the grid of the default.
CONFIG ?=
GRID_NAME ?= prior

VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
READY := $(VENV)/.ready
NOTEBOOKS = find book -name '*.ipynb' ! -path '*/_*' ! -path '*/.*'

.DEFAULT_GOAL := help
.PHONY: help book pdf files test lint lab ablations prior baselines clean distclean

help:
	@echo "make book   run every chapter and build the HTML book (BOOK=: full-length runs)"
	@echo "make pdf    the book as one PDF; needs Chromium"
	@echo "make files  the pages and the chapters as ZIP files, and the PDF"
	@echo "make test   lint, check types and run all tests"
	@echo "make lint   the checks alone, without the tests"
	@echo "make lab    open the chapters in JupyterLab"
	@echo "make ablations  run what is missing of the grid for Tab. 3 (hours)"
	@echo "make prior  run what is missing of the comparison of priors (hours)"
	@echo "make baselines  run what is missing of the comparison of methods (hours)"
	@echo "make clean  remove the built book and caches (keeps .venv, data, runs)"
	@echo "make distclean  the same, and .venv"
	@echo "Each first installs the pinned requirements into .venv, once."

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v[:2])'
	@echo "installing into $(VENV) (a few minutes, about 6 GB, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

book: $(READY)
	@$(BIN)/python book/build.py $(BOOK)

# Files to take away, made of the pages, which are built first where they are stale.
pdf: book
	@$(BIN)/python book/deliver.py pdf

files: book
	@$(BIN)/python book/deliver.py

lint: $(READY)
	$(BIN)/python -m ruff check --quiet .
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m mypy --no-error-summary
	@echo "nbstripout: every chapter is stored without outputs"
	@$(NOTEBOOKS) -exec $(BIN)/python -m nbstripout --keep-id --verify {} +

test: lint
	$(BIN)/python -m pytest -q $(TESTS)

# No news, no look for updates, no list of extensions: nothing is asked of another machine.
LAB_OPTIONS := --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
  --LabApp.extension_manager=readonly
# Nor does JupyterLab ask on its first start whether to fetch news. What widgets call runs between the cells, not
# in a thread beside them: a kernel has lost changes in that way.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
LAB_OVERRIDES := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}, \
  "@jupyterlab/apputils-extension:kernels-settings": {"commsOverSubshells": "disabled"}}

# One folder of data for JupyterLab, whose kernels run in book/, and for papermill.
lab: $(READY)
	@mkdir -p $(LAB_SETTINGS)
	@echo '$(LAB_OVERRIDES)' > $(LAB_SETTINGS)/overrides.json
	@HGAD_DATA="$${HGAD_DATA:-$(CURDIR)/data}" $(BIN)/python -m jupyter lab $(LAB_OPTIONS) book/explore.ipynb

ablations: $(READY)
	@$(BIN)/python -m snakemake --workflow-profile workflow/profiles/local $(GRID)

prior: $(READY)
	@$(BIN)/python -m snakemake --workflow-profile workflow/profiles/local $(GRID) --config grid=$(GRID_NAME) $(CONFIG)

baselines: $(READY)
	@for grid in baselines baselines_one_for_one; do \
	  $(BIN)/python -m snakemake --workflow-profile workflow/profiles/local $(GRID) --config grid=$$grid $(CONFIG) \
	    || exit; done

clean:
	rm -rf book/_executed book/_build .pytest_cache .mypy_cache .ruff_cache
	find hgadlib book tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
