# make demo   sets up, compiles a genuine Edifice checkpoint, verifies it and runs it
# make test   sets up, then lint, types and tests
# make bench  sets up, then measures against the peers
# make tune-shipped  tunes the default model anew for every shipped log, on this machine, 10 minutes

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
# Of tune-shipped: the log of this machine's features; targets and their logs; trials a target and
# thread count. A machine without AVX-512 makes LOGS=x86-64-v3:x86-64-v3 alone.
NATIVE_LOG ?= zen4
LOGS ?= x86-64-v3:x86-64-v3 x86-64-v4:x86-64-v4 native:$(NATIVE_LOG)
TRIALS ?= 260
SEQ_LENS ?= 16,60,256
TUNED ?= schedules/tuned
CHECKPOINT := tests/golden/checkpoints/tiny_trained

.PHONY: demo test lint bench tune-shipped clean

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

# Each log is made aside and takes the old one's place when it is whole.
tune-shipped: $(VENV)/.tune
	set -e; for log in $(LOGS); do \
		target=$${log%%:*}; place=$(TUNED)/$${log#*:}; rm -rf $$place.new; \
		for threads in 1 2; do \
			$(BIN)/python -m mega_tvm.tune --target $$target --threads $$threads \
				--seq-len $(SEQ_LENS) --trials $(TRIALS) --tuning-log $$place.new; \
		done; \
		$(BIN)/python -m mega_tvm.tune --keep-best --tuning-log $$place.new; \
		rm -f $$place.new/.lock; rm -rf $$place; mv $$place.new $$place; \
	done

# A stamp a set of extras, renewed when what they install changes.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
