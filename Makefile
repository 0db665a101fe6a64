# Two commands do everything on a fresh machine with Python 3.11: make demo, make test.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
DATA ?= digits
JOBS ?= 2

.PHONY: demo test lint types docs docs-serve figures notebook package bench bench-fast bench-rivals coverage-sweep clean

# pip resolves torch, torchvision and timm together: their builds must match.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/hq-plugin demo --data $(DATA)

# Several processes of one thread each: two of two threads that share two cores wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy integrations

# The site, in build/site; a link that leads nowhere is an error. `make docs-serve` shows it while you write.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The figures of docs/method.md, and the outputs in the notebook, from real runs: minutes.
figures: $(VENV)/.dev
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python docs/figures/execute.py docs/quickstart.ipynb

# The notebook from top to bottom, and the script of the figures.
notebook: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/docs

# Builds sdist and wheel, installs the wheel away from the sources, and uses it.
package: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

# hq_plugin against everything else, docs/benchmarks/matrix.md; days on 2 cores, and resumable.
bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks --claims search front tau
	$(BIN)/python -m tests.benchmarks.overhead

# One small network at one budget, every method: meant for 20 minutes on 2 free cores.
bench-fast: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks --fast

# ModelOpt, MCT, quanto, auto-round, torchao and HQQ, each in an environment made for it; hours, and resumable.
bench-rivals: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.rivals
	$(BIN)/python -m tests.benchmarks.rivals --page

# Every architecture of timm and transformers once, in small; docs/benchmarks/coverage.md. Hours, and resumable.
coverage-sweep: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.coverage -j $(JOBS)

clean:
	rm -rf $(VENV) build *.egg-info
