# make demo: install, train a small model on text that comes with Python, try it
# make test: install with all that the tests need, run them
# make kill: kill training runs KILLS times at random moments; none may lose a bit
# make gpu-check: all that needs a GPU: tests, the T4's code, sanitizer, benchmarks, plots; with
#                 DATA=TEXT (VALID=TEXT) also what is learnt of it in 10 and 60 seconds
# make fuzz: feed the tokenizers, the readers of their files, and the head, projections and feed-forward
#            layer of a model with made-up input for FUZZ_SECONDS each; needs clang
# make sanitize: run the tests of the tokenizers under the address and undefined-behaviour sanitizers
PYTHON ?= python3
MINUTES ?= 3
FUZZ_SECONDS ?= 60
KILLS ?= 50
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: demo test lint format bench kill gpu-check fuzz sanitize clean

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

kill: $(VENV)/installed-test
	$(BIN)/python tests/kill_training.py --kills $(KILLS)

gpu-check: $(VENV)/installed-test
	PYTHON=$(BIN)/python tests/gpu_check.sh

# Each pattern has a program of its own.
FUZZERS := word bpe train head layer split-kGpt2 split-kCl100k split-kCl100kTiktoken split-kO200k split-kWhitespace
FUZZ_FLAGS := -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	-DTINYLM_FUZZING -Icsrc -Icsrc/fuzz -Ibuild/generated

fuzz: $(FUZZERS:%=build/fuzz/%) $(VENV)/installed-test
	for name in $(FUZZERS); do \
	  mkdir -p build/fuzz/corpus/$$name; \
	  build/fuzz/$$name -max_total_time=$(FUZZ_SECONDS) -max_len=256 -len_control=0 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$name- build/fuzz/corpus/$$name || exit 1; \
	done
	$(BIN)/python tests/fuzz_files.py $(FUZZ_SECONDS)

build/fuzz/%: $(wildcard csrc/*.* csrc/fuzz/* csrc/simd/*)
	mkdir -p build/fuzz build/generated
	$(PYTHON) csrc/generate_unicode_tables.py build/generated
	clang++ $(FUZZ_FLAGS) -DTINYLM_PATTERN=$(lastword $(subst -, ,$*)) \
	  csrc/fuzz/fuzz_$(firstword $(subst -, ,$*)).cpp csrc/*.cpp csrc/simd/*.cpp -o $@ -lpthread

# A build and a copy of the package of its own. The sanitizers have to be there before Python, and
# they cannot be short of memory. SANITIZE_PYTHON has what the tests need.
SANITIZE_PYTHON ?= $(CURDIR)/$(BIN)/python
SANITIZE_TESTS := $(wildcard tests/test_word_*.py tests/test_tokenizer_*.py tests/test_bpe_*.py) \
	tests/test_special_tokens.py tests/test_split_patterns.py tests/test_long_calls.py

sanitize: $(if $(filter $(CURDIR)/%,$(SANITIZE_PYTHON)),$(VENV)/installed-test)
	rm -rf build/sanitize && mkdir -p build/sanitize/tinylm
	cp -r $(filter-out %.so,$(wildcard tinylm/*)) build/sanitize/tinylm
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  LDFLAGS="-fsanitize=address,undefined" TINYLM_REQUIRE_EXT=1 $(SANITIZE_PYTHON) setup.py -q \
	  build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) \
	  $$(gcc -print-file-name=libstdc++.so)" $(SANITIZE_PYTHON) -m pytest -q \
	  -k "not too_little_memory and not tensor" -p no:cacheprovider $(SANITIZE_TESTS:%=../../%)

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
