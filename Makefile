PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
LOWEST := .venv-lowest
# Two processes share the test files; none is split, so what a module sets up is set up once.
TEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-lowest lint clean

demo: $(VENV)/installed  ## the whole path on the embedded model, in minutes
	$(VENV)/bin/lop demo

test: $(VENV)/installed-test  ## everything that CI runs but the linters
	$(VENV)/bin/python $(TEST)

test-lowest: $(LOWEST)/installed  ## the same with the oldest dependencies that pyproject.toml allows; on Python 3.11
	$(LOWEST)/bin/python $(TEST)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
		|| { echo "LOP needs Python 3.11 to 3.14; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,lint]'
	@touch $@ $(VENV)/installed

$(LOWEST)/installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs
