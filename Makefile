# What a person types. `make help` lists it.
TORCH ?= 2.13.0
TORCH_INDEX_URL ?=
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
RECIPE ?= nano
RUN ?= runs/nano-gpu

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard setup.py kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.hpp)
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test test-long lint bench model-report clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "Variables: HOST, PORT, ARGS (more flags of braid serve), RECIPE (whose model is measured), RUN (the folder that it was trained in), PYTHON, TORCH (a version), TORCH_INDEX_URL (an index of torch builds)"

# The pinned torch first: the package itself only asks for a range.
$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$(TORCH)" $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(PIP) -e ".[video]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	@touch $@

# Ray alone is larger than all other tests need together, and one file of the long ones needs it.
$(VENV)/.installed-ray: $(VENV)/.installed-test
	$(PIP) -e ".[test,ray]"
	@touch $@

serve: $(VENV)/.installed ## install if need be, fetch the default model, serve it
	$(BIN)/braid serve --host $(HOST) --port $(PORT) $(ARGS)

lint: $(VENV)/.installed-test ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## what CI runs; says at the end what it left out
	$(BIN)/python -m pytest -q -m "not long and not gpu" $(ARGS)

test-long: $(VENV)/.installed-ray ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -q -m "long and not gpu" $(ARGS)

bench: $(VENV)/.installed ## start a server, load it over HTTP, report
	$(BIN)/python -m bench.load $(ARGS)

model-report: $(VENV)/.installed-test ## measure the shipped model (minutes; ARGS=--quick for less) and rewrite docs/model.md and its card
	$(BIN)/python -m training.evaluate --artefact weights/braid-$(RECIPE) --recipe $(RECIPE) --run $(RUN) --out runs/model-report $(ARGS)
	$(BIN)/python -m training.report --evaluation runs/model-report --run $(RUN) --card weights/braid-$(RECIPE)/README.md --name braid-$(RECIPE)

clean: ## the environment, builds and caches; never the model cache
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache kernels/cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
