# `make search` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
ARGS ?=
BIN := .venv/bin

.PHONY: help search test bench bench-gpu tune-gpu lint format sanitize clean

help:
	@echo "make search   search, derive, train and export a network for this machine (ARGS=... are passed on)"
	@echo "make test     every test"
	@echo "make bench    memory and speed, as ratios within one run"
	@echo "make bench-gpu correctness and speed on a GPU (exit code 2 without one)"
	@echo "make tune-gpu the GPU kernels' table of configurations, measured on this card (exit code 2 without one)"
	@echo "make lint     ruff, mypy, clang-format (make format applies what can be applied)"
	@echo "make sanitize the CPU kernels under AddressSanitizer and UBSan, without torch (a minute or two)"
	@echo "make clean    remove what was built; .venv and runs/ stay"

.venv/installed: requirements.txt
	@echo "[1/2] Python environment in .venv: $(TORCH) and requirements.txt (a minute or two)"
	@$(PYTHON) -m venv .venv || { echo "No venv module for $(PYTHON): on Debian and Ubuntu, 'apt-get install python3-venv' brings it." >&2; exit 2; }
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -r requirements.txt
	@touch $@

.venv/built: .venv/installed pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo "[2/2] C++ extension"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

search: .venv/built
	@$(BIN)/proxyless-fast search --all $(ARGS)

test: .venv/built
	@$(BIN)/pytest $(ARGS)

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
	@$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: .venv/built
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

sanitize:
	@csrc/tests/sanitize.sh

clean:
	@rm -rf build dist *.egg-info proxyless_fast/*.so .venv/built .pytest_cache .mypy_cache .ruff_cache
