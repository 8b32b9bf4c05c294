# The two commands: `make train` and `make test`. The others are for developers.
# Everything runs in .venv, which is made on first use and again when the package's build inputs change.
#   make train ARGS="--steps 500"      options for the command behind a target
#   make PYTHON=python3.12 test        another interpreter

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.h)

.PHONY: train test install lint types format bench docs wheel clean

train: $(INSTALLED)
	$(BIN)/cdm-fast train $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

install: $(INSTALLED)

# torch first: the kernels are compiled against the one that is there, and an isolated build need not install its own.
$(INSTALLED): pyproject.toml setup.py $(wildcard building/*.py) constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "cdm_fast needs Python 3.11 or newer, this is " + sys.version.split()[0] + \
	    ": name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@ls cdm_fast/_C.* > /dev/null 2>&1 || \
	    echo "No C++ kernels were built: ops run on their reference. $(BIN)/cdm-fast doctor tells why."
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# The site, in build/docs; a warning (a link that leads nowhere, say) is an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs

# Without isolation: the build requirements are among the development extras.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info cdm_fast/*.so
