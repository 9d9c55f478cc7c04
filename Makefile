# make test       environment, lint, types, import contracts, suite
# make test-full  the whole matrices of layouts, compile and fuzzing, which `make test` samples
# make demo       environment, then `omniloom demo` into runs/demo

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder  # two processes; the tests of one file share what they build

.PHONY: test test-full demo lint setup clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not full"

# what fails beside others runs once more by itself: ranks of several tests share the cores
test-full: setup
	$(BIN)/python -m pytest $(PARALLEL) -m full || $(BIN)/python -m pytest -m full --last-failed --last-failed-no-failures none

demo: setup
	$(BIN)/omniloom demo

clean:
	rm -rf $(VENV) build dist *.egg-info
