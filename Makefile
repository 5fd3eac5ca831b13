# make demo [SIZE=default|tiny|full] [LLM=little|smollm2]   the whole path on real pictures; ends with a report page
# make test                                                 lint and all tests
# Both first make their own environment in .venv; nothing needs to be activated. PYTHON=... picks the interpreter.
SIZE ?= default
LLM ?= little
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions

.PHONY: demo test lint docs setup
demo: .venv/.ready
	@.venv/bin/python -m demo.run size=$(SIZE) llm=$(LLM)

# Small models gain nothing from threads, so the tests run side by side with one thread each.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/multiprocess tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/multiprocess

lint: .venv/.ready
	.venv/bin/python -m ruff check .

# Takes the result of the default demo into the documentation.
docs: runs/demo/results.md
	cp runs/demo/result.png docs/result.png
	cp runs/demo/results.md docs/demo-results.md

setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt setup.sh
	@PYTHON="$(PYTHON)" ./setup.sh
