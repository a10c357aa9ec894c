# make quickstart   set up, then train a tiny model on arithmetic (CPU, minutes)
# make test         set up, then the tests, with the newest versions
# make check        ruff, mypy, import-linter, tests
# make test-unsloth the tests with the real unsloth package, on the versions that it admits
# make gpu-test     the tests marked gpu, on a machine with a GPU, in the Python at hand

PYTHON ?= python3
LATEST := .venv
UNSLOTH := .venv-unsloth
PYTEST := -m pytest
GPU_TESTS = $$(grep -rlE "mark\.gpu|from places import" tests --include="test_*.py")

.PHONY: quickstart test check lint test-unsloth gpu-test gpu-test-core gpu-test-unsloth clean

quickstart: $(LATEST)/.ready
	$(LATEST)/bin/rlvr train

test: $(LATEST)/.ready
	$(LATEST)/bin/python $(PYTEST) -m "not slow and not gpu and not network and not unsloth"

lint: $(LATEST)/.ready
	$(LATEST)/bin/python -m ruff check .
	$(LATEST)/bin/python -m ruff format --check .
	$(LATEST)/bin/python -m mypy
	$(LATEST)/bin/lint-imports

check: lint test

test-unsloth: $(UNSLOTH)/.ready
	$(UNSLOTH)/bin/python $(PYTEST) -m "(unsloth or both) and not slow and not gpu"

# two processes: Unsloth patches the one that imports it
gpu-test: gpu-test-core gpu-test-unsloth

gpu-test-core:
	RLVR_TEST_UNSLOTH=0 PYTHONPATH=src:$$PYTHONPATH $(PYTHON) $(PYTEST) -m "gpu and not unsloth" $(GPU_TESTS)

gpu-test-unsloth:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) $(PYTEST) -m "gpu and unsloth" $(GPU_TESTS)

$(LATEST)/.ready: pyproject.toml constraints/latest.txt
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --constraint constraints/latest.txt --editable ".[dev]"
	touch $@

# unsloth's own dependencies include GPU-only packages (triton, xformers, bitsandbytes): on a CPU it needs none of them
$(UNSLOTH)/.ready: pyproject.toml constraints/unsloth.txt
	$(PYTHON) -m venv $(UNSLOTH)
	$(UNSLOTH)/bin/python -m pip install --quiet --constraint constraints/unsloth.txt --editable ".[test]"
	$(UNSLOTH)/bin/python -m pip install --quiet --no-deps --constraint constraints/unsloth.txt unsloth unsloth_zoo
	touch $@

clean:
	rm -rf $(LATEST) $(UNSLOTH) outputs
