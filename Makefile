# Two commands do all the set-up on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test families gpu docs check lint types layers install install-dev clean

demo: install  ## scan, decompose, lesion and prune the embedded model; writes demo-out/report.html
	$(BIN)/llmbrain demo --out demo-out

test: install-dev  ## the whole test suite, in two processes of one thread each
	$(BIN)/python -m pytest -n 2

families: install-dev  ## every family of transformers, tiny: prints what is wrong, writes docs/families.md
	$(BIN)/python tests/families/table.py

gpu:  ## on a machine with CUDA, in the Python that is there: the tests marked gpu, then benchmarks/gpu.py (ten minutes)
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/gpu.py

docs: $(VENV)/installed-docs  ## docs/_build/html; runs the tutorials, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

check: lint types layers  ## what CI asks besides the tests

lint: install-dev
	$(BIN)/ruff check llmbrain tests benchmarks tutorials docs data
	$(BIN)/ruff format --check llmbrain tests benchmarks tutorials docs data

types: install-dev
	$(BIN)/mypy

layers: install-dev
	$(BIN)/lint-imports

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# CPU torch first: the pin has a small CPU build, and what is installed satisfies every later range.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(f'Python 3.11 to 3.13 is needed, this is {sys.version}' if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet -c constraints.txt -e ".[dev,picard,encoding,recovery,harness,serve,onnx]"
	-$(PIP) install --quiet -c constraints.txt -e ".[bids]"  # the official validator; its test skips where it has no wheel
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info docs/_build docs/auto_examples docs/api/generated
