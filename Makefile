# Needs Python >= 3.11 and make; everything else is installed into .venv. Another Python: `make setup PYTHON=python3.12`.
PYTHON ?= python3
BIN := .venv/bin
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
REQUIREMENTS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *p["optional-dependencies"]["test"], sep="\n")

ALFWORLD := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["optional-dependencies"]["alfworld"], sep="\n")
ENV ?= scienceworld

.PHONY: setup alfworld test demo lint clean

setup: .venv/.installed

# Installs only when pyproject.toml changed; the stamp is written last, so an interrupted install starts again.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c '$(RECENT)' || { echo "nanoHRL needs Python >= 3.11, but $(PYTHON) is \
	$$($(PYTHON) --version 2>&1): name another one, e.g. make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(RECENT)' 2>/dev/null || $(PYTHON) -m venv --clear .venv || { \
	echo "$(PYTHON) cannot make .venv: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing into .venv (minutes the first time: torch is large)"
	@$(BIN)/python -c '$(REQUIREMENTS)' > .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -r .venv/requirements.txt
	@touch $@

# The real ALFWorld engine, against which the fast one is tested; nothing else needs it. It compiles C++.
alfworld: setup .venv/.alfworld

.venv/.alfworld: pyproject.toml
	@$(BIN)/python -c '$(ALFWORLD)' > .venv/alfworld.txt
	@echo "building the real ALFWorld engine into .venv (2 to 4 minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r .venv/alfworld.txt \
	|| { echo "the real ALFWorld engine needs a C++ compiler (Debian, Ubuntu: apt install g++ make)" >&2; exit 1; }
	@touch $@

# A file of tests on each core, one thread each. Without a C++ compiler the tests of the real engine are skipped, and say so.
test: setup
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory alfworld; \
	else echo "no C++ compiler: the real ALFWorld engine is not tested (apt install g++)" >&2; fi
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# make demo ENV=alfworld for the other world.
demo: setup
	$(BIN)/python demo.py --env $(ENV)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# Caches, and the stamp of the install; out/ is yours and .venv itself stays.
clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis .venv/.installed .venv/.alfworld
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
