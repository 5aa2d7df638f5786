PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Each of the many processes that tests start would compile every source anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all freeze lint type bench clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(INSTALLED)  ## train an agent in the twin, compare it with static and rule_based, write a report
	$(BIN)/python -m agents.demo

# First, alone, a short training and an episode of each kind of service: they compile what the workers of the
# tests would all compile at once.
test: $(INSTALLED)  ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -q tests/agents/learning/test_training.py tests/thermoe_env/test_env.py \
		tests/thermoe_env/test_env_tokens.py -k "the_seed_decides or same_keys or the_twin_plays"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: test  ## run the tests, then the slow ones, which repeat at length what the others hold
	$(BIN)/python -m pytest -m slow

freeze: $(INSTALLED)  ## renew the digests of what must not move (tests/frozen.json); say in the commit what moved
	$(BIN)/python -m tests.frozen --renew

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## check types
	$(BIN)/pyright

bench: $(INSTALLED)  ## measure the speed of the environment and the model
	$(BIN)/python -m benchmarks.env_speed
	$(BIN)/python -m benchmarks.train_speed
	$(BIN)/python -m benchmarks.service_overhead

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: where a CPU build is wanted, it is put in place before anything can ask for another.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ThermalMoE needs Python 3.11 or later; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
