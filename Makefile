# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .scalselect
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo train dev test test-quick e2e faults loaders gpu lint format constraints screenshots clean

help:  ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED)  ## Create .venv with the package and everything that the tests need

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
		-e '.[dev,training,exports-check]'
	@# Pip would compile on one core. What a package has for another Python does not compile, and need not.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: install  ## Generate a pool and a small VLM, run the whole path, say where the selection is
	$(BIN)/scalselect demo --folder $(DEMO)

train: install  ## Fine-tune the demo's model on what the demo selected (a minute; after `make demo`)
	@test -f $(DEMO)/demo/training_dataset/manifest.json || { echo "run 'make demo' first"; exit 1; }
	DAGSTER_HOME=$(abspath $(DEMO)/demo/dagster) $(BIN)/dagster asset materialize \
		-m training.definitions --select demo/training_run -c training/demo.yaml

dev: install  ## Open the Dagster UI (http://127.0.0.1:3000) on the demo's store
	@test -f $(DEMO)/demo/selection.yaml || { echo "run 'make demo' first"; exit 1; }
	$(BIN)/scalselect ui --store $(DEMO)/demo

# Tests start many processes, which would else compile the code each for itself.
test test-quick e2e faults: export PYTHONDONTWRITEBYTECODE :=

test: install  ## Run all tests (ten minutes on two cores)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-quick: install  ## Run the tests without Dagster runs, models and processes (a minute on two cores)
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 2 --dist worksteal

e2e: install  ## Run the test of a real Dagster deployment on loopback (five minutes)
	$(BIN)/python -m pytest -m e2e -s

faults: install  ## Run the tests that kill processes, fill disks and move clocks
	$(BIN)/python -m pytest -m faults -n auto

gpu:  ## Measure the representation on a CUDA device (five minutes; with the torch of PYTHON, not .venv)
	PYTHON=$(PYTHON) benchmarks/gpu.sh

# Both need an older Transformers than the rest, and many packages that no other test needs.
loaders: install  ## Read the exports with LLaMA-Factory's and ms-swift's own loaders (downloads gigabytes)
	@for trainer in llamafactory==0.9.5 ms-swift==4.6.0; do \
		environment=.venv-loaders/$${trainer%%==*}; \
		$(PYTHON) -m venv $$environment && \
		$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
			| grep -vE '^(torch|transformers|tokenizers)' > $$environment/needed.txt && \
		$$environment/bin/python -m pip install --quiet $$trainer pytest hypothesis num2words -r $$environment/needed.txt && \
		$$environment/bin/python -m pip install --quiet --no-deps -e . && \
		$$environment/bin/python -m pytest -rs tests/dataset/exports/test_loaders.py || exit 1; \
	done

lint: install  ## Check style, types, the import contract and the declared dependencies
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# The product may import its own dependencies only; tests and training also those of the extras.
	$(BIN)/deptry scalselect_assets
	$(BIN)/deptry . --ignore DEP002,DEP004

format: install  ## Rewrite the code in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints: install  ## Renew constraints.txt: pins stay, what is new is pinned; UPGRADE=torch moves a pin
	$(BIN)/uv pip compile --quiet --universal --all-extras --no-annotate --output-file constraints.txt \
		--custom-compile-command 'make constraints' $(addprefix --upgrade-package=,$(UPGRADE)) pyproject.toml

screenshots: install  ## Take the README's pictures of the UI again (after `make demo`; needs Chromium)
	$(BIN)/python docs/images/screenshots.py --store $(DEMO)/demo

clean:  ## Remove the environment, caches and the demo
	rm -rf $(VENV) .venv-loaders $(DEMO) .training build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
