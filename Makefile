# `make demo` and `make test` set up their own virtual environment; PYTHON and VENV can be given.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= build/demo
RUN = $(VENV)/bin/python
# one process for each core (the tests use one thread each)
PYTEST = $(RUN) -m pytest -q -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(RUN) -m traces.record --out $(DEMO)/recording --limit 2 --max-new-tokens 96 --overwrite
	$(RUN) -m traces.profile --out $(DEMO)/profile.json --quick --overwrite
	$(RUN) -m live.bench $(DEMO)/recording --profile $(DEMO)/profile.json --texts 2 --rounds 2 --in-turns $(DEMO)/in_turns.json
	@echo
	@echo "explore the recording: $(VENV)/bin/streamlit run app.py -- $(DEMO)/recording"

test: $(VENV)/installed
	$(RUN) -m ruff check .
	$(PYTEST) -m "not long"

test-all: $(VENV)/installed
	$(PYTEST)

clean:
	rm -rf build $(VENV)
