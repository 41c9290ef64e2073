# make demo    compress two small trained models and show what it costs
# make test    run the tests
# make check   lint, types, import rules
# Each creates the environment in .venv when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check install wheel clean

demo: install
	@$(BIN)/moeprune --multirun experiment=demo
	@echo
	@echo "Next: $(BIN)/moeprune --multirun ratio=0.25,0.5,0.75 allocator=coverage,uniform scorer=attribution,activation"

test: install
	@$(BIN)/python -m pytest --numprocesses auto --dist loadgroup

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layering.py

install: $(VENV)/installed

# torch comes first and by its exact version, so that pip takes the build this machine's index offers for it.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

wheel: install
	@$(BIN)/hatchling build --target wheel

clean:
	rm -rf dist runs cache
