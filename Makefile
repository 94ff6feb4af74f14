# Everything there is to do here. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
ifneq ($(origin PYTHON),file) # asked for: beside a .venv of another version it has a folder of its own, such as .venv-3.13
VENV   := $(shell scripts/pythons.sh venv '$(PYTHON)')
$(if $(VENV),,$(error no packages for PYTHON=$(PYTHON)))
endif
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MYSQL  := $(VENV)/share/ncr-mysql
PEERS  := $(VENV)/.peers
SEED   ?=
TRIALS ?=
JOBS   ?= 500
ONLY   ?=
DATA   ?= package

.DEFAULT_GOAL := help
.PHONY: help setup demo dev test test-pythons chaos deploy-test soak bench profile check format docs lock clean servers

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv and install everything pinned (once)

$(READY): requirements-dev.txt pyproject.toml src/ncr_validator/khronos/package-lock.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@echo "setup: installing into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt 2>$(VENV)/pip.log || (cat $(VENV)/pip.log >&2; exit 1)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . 2>$(VENV)/pip.log || (cat $(VENV)/pip.log >&2; exit 1)
	@$(BIN)/python -m ncr_validator fetch-engine
	@touch $@

servers: $(READY) ## Install the real servers the tests use (root on Debian; else says what is missing)
	@scripts/servers.sh
	@test -e $(MYSQL) -o ! -d .venv/share/ncr-mysql/empty || ln -s $(CURDIR)/.venv/share/ncr-mysql $(MYSQL)
	@scripts/mysql.sh $(MYSQL) || echo "servers: the tests on MySQL itself will be skipped; MariaDB stands in" >&2

demo: $(READY) ## Deliver a product on the whole stack, watch it, check it
	@$(BIN)/ncr demo

dev: $(READY) ## Run the whole stack on port 8001 until Ctrl-C
	@$(BIN)/ncr dev

test: $(READY) servers ## Run every test on real parts (PYTHON=python3.13 for another version)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

test-pythons: ## Run the tests that need no servers on every Python from 3.11 on that is found
	@scripts/pythons.sh test

chaos: $(READY) servers ## Break everything at random for ten minutes and judge the outcome (SEED=, TRIALS=)
	@$(BIN)/python tests/chaos/run.py $(if $(SEED),--seed $(SEED)) $(if $(TRIALS),--trials $(TRIALS))

deploy-test: $(READY) ## Deploy, roll back, kill and restore under load on this machine's Docker (ten minutes; deploy.json)
	@$(BIN)/python tests/deploy/run.py

soak: $(READY) ## Deliver JOBS=500 small jobs while memory comes and goes (root; benchmarks/soak.py --help)
	@$(BIN)/python benchmarks/soak.py --jobs $(JOBS) --out soak.json

bench: $(PEERS) servers ## Measure every figure beside its peer's: benchmarks/results.json, docs/performance.md (ONLY=package)
	@scripts/servers.sh --bench
	@$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY))

profile: $(PEERS) servers ## Where the time of one delivery goes (DATA=package, many_small, one_huge, redelivery)
	@scripts/servers.sh --bench
	@$(BIN)/python benchmarks/profiling.py $(DATA)

$(PEERS): $(READY) requirements-bench.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.txt 2>$(VENV)/pip.log || (cat $(VENV)/pip.log >&2; exit 1)
	@touch $@

check: $(READY) ## Format, lint, types and import contracts (under a minute)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(READY) ## Draw what comes from tests and settings (tables, env_sample), then build the site in var/docs/site
	@$(BIN)/python scripts/env_sample.py
	@$(BIN)/python scripts/reliability_table.py
	@$(BIN)/python scripts/docs_site.py

lock: $(READY) ## Re-lock the dependencies (scripts/lock.sh --upgrade for the newest)
	@scripts/lock.sh

clean: ## Remove what was built and what the embedded stack kept
	rm -rf .venv .venv-* var .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
