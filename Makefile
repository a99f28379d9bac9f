PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
COUNT ?= 32
# As workers have it: docs/decisions/0012.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test test-slow simulate fleet chaos smoke k8s fuzz check up down format

demo: $(VENV)/installed  ## the main job, end to end; DATASET=folder and COUNT=n change what it works on
	$(BIN)/meddiff demo --count $(COUNT) $(if $(DATASET),--dataset "$(DATASET)")

test: check  ## everything that ends within 15 minutes
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/installed  ## the rest, within 45 minutes
	$(BIN)/pytest -m slow

simulate: $(VENV)/installed  ## the planner under a discrete clock, RUNS times with mishaps
	$(BIN)/python tests/simulation $(or $(RUNS),3000)

fleet: $(VENV)/installed  ## the planner's cost and its estimates, from 10 jobs to 10000
	$(BIN)/python tests/simulation $(addprefix --fleet ,$(or $(FLEETS),10:1 100:8 1000:40 10:1:8 10000:200:8))

smoke: $(VENV)/installed  ## the compose stack built, brought up, used and taken down; ENGINE, COMPOSE and STORE as it says
	deploy/smoke.sh

k8s: $(VENV)/installed  ## every overlay against the schemas; needs kubectl
	$(BIN)/python k8s/validate.py

chaos: $(VENV)/installed  ## the services under fire, RUNS times
	$(BIN)/python tests/chaos $(or $(RUNS),40)

fuzz: $(VENV)/installed  ## the gateway against its OpenAPI, EXAMPLES an operation
	EXAMPLES=$(or $(EXAMPLES),500) $(BIN)/pytest -s tests/gateway/test_fuzz.py

check: $(VENV)/installed  ## format, lint, types, arrows between packages, what is deployed, secrets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/*.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml deploy/compose.gpu.yml
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-files 'rows\.jsonl' --exclude-lines 'secretName:'

up: $(VENV)/installed  ## the embedded stack, in the background
	$(BIN)/meddiff up

down: $(VENV)/installed
	$(BIN)/meddiff down

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and pinned: whatever asks for it later finds the CPU build in place.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
