# make demo   sets up, compiles a genuine Edifice checkpoint, verifies it and runs it
# make test   sets up, then lint, types and tests
# make bench  sets up, then measures against the peers

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
CHECKPOINT := tests/golden/checkpoints/tiny_trained

.PHONY: demo test lint bench clean

demo: $(VENV)/.compile
	mkdir -p $(OUT)
	$(BIN)/python -m mega_tvm.inspect $(CHECKPOINT).nx
	$(BIN)/python -m mega_tvm.compile --weights $(CHECKPOINT).nx --batch 1,2 -o $(OUT)/tiny_trained.so
	$(BIN)/python -m mega_tvm.verify $(OUT)/tiny_trained.so --golden $(CHECKPOINT).npz
	$(BIN)/python examples/run_model.py $(OUT)/tiny_trained.so

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(VENV)/.bench
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m mega_tvm.bench --workloads all

# A stamp a set of extras, renewed when what they install changes.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
