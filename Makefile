# The commands of this project. `make setup` is part of each, and takes a moment when all is there.
.DEFAULT_GOAL := help
.PHONY: help setup demo test testall lint bench lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## bring what is missing: uv, Java for Spark, the locked environment
	@scripts/setup

demo: setup ## the whole path on this machine: curate, train four stages, paint, score
	@.venv/bin/atelier run recipes/demo.yaml

test: setup ## the tests of some seconds each, and a tiny recipe through the whole path; no network, no GPU
	@.venv/bin/python -m pytest -m "not slow and not bench"

testall: setup ## those, and the slow ones: real Spark, Ray and MLflow from end to end, kills, faults
	@.venv/bin/python -m pytest

lint: setup ## style, formatting, strict types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy --strict app demo infra model pipelines training tests

bench: setup ## the measured figures of docs/benchmarks on this machine
	@.venv/bin/python -m pytest tests/benchmarks -m bench -s -q

lock: setup ## compile requirements/*.txt again from pyproject.toml; LOCK=--upgrade takes newer versions
	@scripts/lock $(LOCK)
