# make demo [SIZE=default|tiny|full] [LLM=little|smollm2]   the whole path on real pictures; ends with a report page
# make test                                                 lint and all tests
# make test-hosts                                           the plugin in the original LLaVA, in older transformers, in lmms-eval
# All first make their own environment in .venv; nothing needs to be activated. PYTHON=... picks the interpreter.
SIZE ?= default
LLM ?= little
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions

.PHONY: demo test test-hosts lint docs setup
demo: .venv/.ready
	@.venv/bin/python -m demo.run size=$(SIZE) llm=$(LLM)

# Small models gain nothing from threads, so the tests run side by side with one thread each.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/multiprocess --ignore tests/hosts/llava tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/multiprocess

# transformers-*: one version of transformers and the original LLaVA; the newest transformers is that of `make test`.
HOSTS := transformers-4.36 transformers-4.37 lmms-eval
test-hosts: $(HOSTS:%=.venv-hosts/%/.ready)
	for host in $(HOSTS); do \
	    tests=tests/hosts; [ $$host != lmms-eval ] || tests=tests/hosts/lmms_eval; \
	    OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-hosts/$$host/torch_extensions \
	        .venv-hosts/$$host/bin/python -m pytest --confcutdir tests/hosts -n 2 --dist loadfile $$tests || exit 1; \
	done

.venv-hosts/%/.ready: tests/hosts/%.txt tests/hosts/setup.sh pyproject.toml
	@PYTHON="$(PYTHON)" tests/hosts/setup.sh $*

lint: .venv/.ready
	.venv/bin/python -m ruff check .

# Takes the result of the default demo into the documentation.
docs: runs/demo/results.md
	cp runs/demo/result.png docs/result.png
	cp runs/demo/results.md docs/demo-results.md

setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt setup.sh
	@PYTHON="$(PYTHON)" ./setup.sh
