# `make search` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
ARGS ?=
BIN := .venv/bin
# Twice quiet: warnings of pip about its own configuration would bury the lines that say how far it is.
PIP := $(BIN)/pip install -qq --disable-pip-version-check
# Tests in as many processes as there are cores, four at most. A thread that waits gives its core to the other process.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
CPP_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help search test test-quick fuzz bench bench-gpu tune-gpu lint audit format docs dist sanitize clean

help:
	@echo "make search     search, derive, train and export a network for this machine (ARGS=... are passed on)"
	@echo "make test       every test"
	@echo "make test-quick the tests to run while working: a minute or so"
	@echo "make fuzz       damaged, hostile and random input: a minute for each fuzzer (ARGS=... are passed on)"
	@echo "make bench      memory and speed, as ratios within one run"
	@echo "make bench-gpu  correctness and speed on a GPU (exit code 2 without one)"
	@echo "make tune-gpu   the GPU kernels' table of configurations, measured on this card (exit code 2 without one)"
	@echo "make lint       ruff, mypy, clang-format (make format applies what can be applied)"
	@echo "make audit      bandit over the sources, pip-audit over requirements.txt (which asks an advisory service)"
	@echo "make docs       the documentation as a site in build/docs; warnings are errors"
	@echo "make dist       source distribution and wheel in dist/, tried in a clean environment"
	@echo "make sanitize   the CPU kernels under AddressSanitizer and UBSan, without torch (a minute or two)"
	@echo "make clean      remove what was built; .venv and runs/ stay"

.venv/installed: requirements.txt
	@echo "[1/2] Python environment in .venv: $(TORCH) and requirements.txt (a minute or two)"
	@$(PYTHON) -m venv .venv || { echo "No venv module for $(PYTHON): on Debian and Ubuntu, 'apt-get install python3-venv' brings it." >&2; exit 2; }
	@$(PIP) $(TORCH) -r requirements.txt
	@touch $@

.venv/built: .venv/installed pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo "[2/2] C++ extension (about a minute on two cores)"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

.venv/docs: .venv/installed docs/requirements.txt
	@$(PIP) -r docs/requirements.txt
	@touch $@

search: .venv/built
	@$(BIN)/proxyless-fast search --all $(ARGS)

test: .venv/built
	@$(PYTEST) $(ARGS)

test-quick: .venv/built
	@$(PYTEST) -m "not slow" $(ARGS)

# Decoders complain of damaged files on the error stream, line upon line; it is shown where a fuzzer fails.
fuzz: .venv/built
	@mkdir -p build; for file in tests/fuzz/[!_]*.py; do case $$file in */test_*) continue;; esac; echo "$$file"; \
		$(BIN)/python -m tests.fuzz.$$(basename $$file .py) --seconds 60 $(ARGS) 2> build/fuzz.log || \
		{ tail -n 30 build/fuzz.log; exit 1; }; done

bench: .venv/built
	@$(BIN)/proxyless-fast bench $(ARGS)

bench-gpu: .venv/built
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

tune-gpu: .venv/built
	@$(BIN)/python -m benchmarks.gpu.tune $(ARGS)

lint: .venv/built
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

audit: .venv/installed
	@$(PIP) bandit pip-audit
	@$(BIN)/bandit -q -c pyproject.toml -r proxyless_fast
	@$(BIN)/pip-audit -r requirements.txt --no-deps --disable-pip

format: .venv/built
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP_FILES)

docs: .venv/docs
	@$(BIN)/mkdocs build --strict --quiet
	@echo "build/docs/index.html"

dist: .venv/installed
	@tests/packaging/run.sh "$(PYTHON)" "$(TORCH)"

sanitize:
	@csrc/tests/sanitize.sh

clean:
	@rm -rf build dist *.egg-info proxyless_fast/*.so .venv/built .pytest_cache .mypy_cache .ruff_cache
