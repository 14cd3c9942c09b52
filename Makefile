# make demo: install, train a small model on text that comes with Python, try it
# make test: install with all that the tests need, run them
# make gpu-check: all that needs a GPU: tests, the T4's code, sanitizer, benchmarks, plots
# make fuzz: feed the tokenizers with made-up input for FUZZ_SECONDS each; needs clang
PYTHON ?= python3
MINUTES ?= 3
FUZZ_SECONDS ?= 60
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: demo test lint format bench gpu-check fuzz clean

demo: $(VENV)/installed
	$(BIN)/tinylm doctor
	$(BIN)/tinylm train --data builtin --minutes $(MINUTES) --out runs/demo --fresh
	@echo; echo "--- samples"
	$(BIN)/tinylm generate runs/demo "The function returns" --max-new-tokens 60 --seed 1
	$(BIN)/tinylm generate runs/demo "If the file" --max-new-tokens 60 --seed 1
	@echo; echo "--- most likely next tokens after \"Return the\""
	$(BIN)/tinylm next runs/demo "Return the" --top 5
	@echo; echo "The curve of its loss is in runs/demo/loss.png. Try next:"
	@echo "  $(BIN)/tinylm chat runs/demo"
	@echo "  $(BIN)/tinylm eval runs/demo"
	@echo "  $(BIN)/tinylm train --data YOUR.txt --minutes 5 --out runs/mine"

test: $(VENV)/installed-test
	$(BIN)/pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

bench: $(VENV)/installed-test
	$(BIN)/pytest bench/bench_*.py

gpu-check: $(VENV)/installed-test
	PYTHON=$(BIN)/python tests/gpu_check.sh

# Each pattern has a program of its own.
FUZZERS := word bpe split-kGpt2 split-kCl100k split-kCl100kTiktoken split-kO200k split-kWhitespace
FUZZ_FLAGS := -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	-DTINYLM_FUZZING -Icsrc -Icsrc/fuzz -Ibuild/generated

fuzz: $(FUZZERS:%=build/fuzz/%)
	for name in $(FUZZERS); do \
	  mkdir -p build/fuzz/corpus/$$name; \
	  build/fuzz/$$name -max_total_time=$(FUZZ_SECONDS) -max_len=256 -len_control=0 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$name- build/fuzz/corpus/$$name || exit 1; \
	done

build/fuzz/%: $(wildcard csrc/*.* csrc/fuzz/*)
	mkdir -p build/fuzz build/generated
	$(PYTHON) csrc/generate_unicode_tables.py build/generated
	clang++ $(FUZZ_FLAGS) -DTINYLM_PATTERN=$(lastword $(subst -, ,$*)) \
	  csrc/fuzz/fuzz_$(firstword $(subst -, ,$*)).cpp csrc/*.cpp -o $@ -lpthread

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that a change in tinylm/ needs no new installation; one in csrc/ makes one.
$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	TINYLM_REQUIRE_EXT=1 $(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	TINYLM_REQUIRE_EXT=1 $(BIN)/pip install -q -c constraints.txt -e ".[test,bench,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tinylm/*.so runs/demo
