# The only entry: every target sets up what it needs. `make` alone lists them.
PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
# The theme prints a page about its successor on every build otherwise.
export NO_MKDOCS_2_WARNING := 1
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup compare test evidence check check-native docs bench figures clean
# Timings and the two test workers want the machine to themselves, so -j must not mix the targets.
.NOTPARALLEL:

help:
	@echo "make compare   the main job: dense attention and the methods, on the bundled model and text"
	@echo "make test      all tests but the papers' evidence"
	@echo "make evidence  the tests that show what the registered papers claim"
	@echo "make check     format, lint, types, register, tables, docs and wheel"
	@echo "make check-native  the native engine's tests under sanitizers"
	@echo "make docs      regenerate the tables and build the site into site/"
	@echo "make bench     every script of benchmarks/"
	@echo "make figures   every recorded run again, one after the other (an hour and more; a quiet machine)"
	@echo "make setup     only the virtual environment in .venv (PYTHON=$(PYTHON))"
	@echo "make clean     remove what was built; .venv stays"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing Tilewise and its tools into .venv (once; a few minutes, mostly torch)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[compare,test,dev,docs]"
	@touch $@

compare: $(STAMP)
	@mkdir -p reports
	@$(BIN)/tilewise compare --out reports/compare.html --json reports/compare.json

test: $(STAMP)
	$(PYTEST) -m "not evidence"

evidence: $(STAMP)
	$(PYTEST) -m "evidence and not timed" --durations=5
	$(BIN)/python -m pytest -n 1 -m "evidence and timed"

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_papers.py
	$(BIN)/python tools/tables.py --check
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/check_wheel.py

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds in any test.
check-native: $(STAMP)
	@echo "compiling with sanitizers and running the native engine's tests (a few minutes)"
	@CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined" \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels/test_native.py tests/kernels/test_uneven_and_ordered.py \
	tests/kernels/test_choose_keys.py tests/attention/test_reads.py \
	tests/conformance/test_rounded.py \
	tests/kernels/test_scan.py tests/kernels/test_gated_rnn.py tests/kernels/test_long_conv.py \
	tests/kernels/test_fwht.py tests/kernels/test_peel_bins.py tests/kernels/test_digit_sums.py \
	-k "not resident_memory and not finite and not compiles and not longer_chunks and not is_that_of_the_tokens and not lesser_machines and not definition and (native or decoding or every_cut or bias or threads or spans or softcap or scores or bits or stands or failures or lengths or packed or sizes or grouped or chunks)"

docs: $(STAMP)
	$(BIN)/python tools/tables.py
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	@for script in $(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script || exit 1; done

# ONLY=compare-all records that run alone. An interrupted selection goes on where it was; RESUME= measures it anew.
RESUME ?= --resume
figures: $(STAMP)
	$(BIN)/python tools/record.py $(ONLY)
	$(if $(ONLY),,$(BIN)/python benchmarks/selection.py $(RESUME))
	$(if $(ONLY),,$(BIN)/python tools/figures.py)
	$(BIN)/python tools/tables.py

clean:
	rm -rf build dist site reports src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
