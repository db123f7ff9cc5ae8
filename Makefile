# nftlet's tasks. `make` alone lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels bench packets scale churn build lint install-deps image

# Finds Rust that is installed for this user only, and `nft` and `ip`, even if PATH lacks them.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
IMAGE   ?= nftlet:$(VERSION)
DOCKER  ?= $(shell command -v docker || command -v podman || echo docker)
# Of `make bench`, `make scale` and `make churn`: sizes of clusters (services x endpoints of each),
# seconds of changes, and the directory of results.
SIZES    ?=
DURATION ?=
RESULTS  ?= benches/results
BENCH    := SIZES=$(SIZES) DURATION=$(DURATION) RESULTS=$(RESULTS) scripts/bench.sh
# Of `make test-kernels`: names in scripts/kernels.txt, and tests.
KERNELS  ?=
TESTS    ?=
# Arguments for the demo and for scenes of benchmarks: make packets ARGS='--sizes 100,10000'
ARGS    ?=

help: ## List the tasks
	@printf 'nftlet %s\n\nUsage: make TASK\n\n' '$(VERSION)'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

MEASURE = scripts/install-deps.sh run && NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain

demo: ## Show services, failover, rejects and network policies in network namespaces (two minutes)
	@scripts/install-deps.sh run
	@echo 'Compiling nftlet and the demo (about four minutes on two cores the first time)'
	cargo build --locked --bin nftlet --example demo
	@scripts/netns-run.sh --explain
	@scripts/netns-run.sh "$${CARGO_TARGET_DIR:-target}/debug/examples/demo" \
	    --nftlet "$${NFTLET:-$${CARGO_TARGET_DIR:-target}/debug/nftlet}" $(ARGS)

test: ## Run every check: format, lints, documentation, dependencies, tests
	@scripts/install-deps.sh test
	@scripts/test.sh

test-kernels: ## Run the integration tests on other kernels: make test-kernels KERNELS="5.10 6.1" TESTS=services::packets
	@scripts/install-deps.sh test
	@KERNELS="$(KERNELS)" scripts/test-kernels.sh $(or $(TESTS),kernel:: services:: policies:: deploy:: laboratory::)

bench: ## Run all benchmarks and compare with the budgets (release build, as root, one hour)
	@$(MEASURE)
	@$(BENCH)

packets: ## Compare connections with kube-proxy's rules and without rules: make packets ARGS='--sizes 100,10000'
	@$(MEASURE)
	@$(BENCH) packets -- $(ARGS)

scale: ## Measure the first rules and changes of clusters: make scale SIZES=1000x10,50000x20
	@$(MEASURE)
	@$(BENCH) first changes -- $(ARGS)

churn: ## Change 500 endpoints a second with traffic for ten minutes, or DURATION=seconds
	@$(MEASURE)
	@$(BENCH) churn -- $(ARGS)

build: ## Build the release binary, target/release/nftlet
	@scripts/install-deps.sh build
	@echo 'Compiling the release build of nftlet (about five minutes on two cores the first time)'
	cargo build --release --locked

lint: ## Check format, lints and documentation only
	@scripts/install-deps.sh build
	@scripts/test.sh format lints documentation

install-deps: ## Install the dependencies of building, testing and the demo
	@scripts/install-deps.sh test

image: ## Build the container image with docker or podman (IMAGE=name:tag)
	$(DOCKER) build --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) --tag $(IMAGE) .
