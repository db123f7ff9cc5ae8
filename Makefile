# nftlet's tasks. `make` alone lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test bench packets scale churn build lint install-deps image

# Rust that was installed for this user only need not be on PATH, nor need `nft` and `ip`.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
IMAGE   ?= nftlet:$(VERSION)
DOCKER  ?= $(shell command -v docker || command -v podman || echo docker)
# Clusters that are measured as services x endpoints of each: make scale SIZES=50000x20
SIZES   ?= 1000x10,10000x10,30000x10,50000x20
# How many seconds endpoints change: make churn DURATION=3600
DURATION ?= 600
# Where the program is that is measured. `cargo bench` puts one of its own in the usual place.
MEASURED = $${CARGO_TARGET_DIR:-target}/measured/nftlet
# Arguments for the demo and for the measurements in the kernel: make bench ARGS='--sizes 1000'
ARGS    ?=

help: ## List the tasks
	@printf 'nftlet %s\n\nUsage: make TASK\n\n' '$(VERSION)'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Show services, failover, rejects and network policies in network namespaces (two minutes)
	@scripts/install-deps.sh run
	@echo 'Compiling nftlet and the demo: some four minutes on two cores the first time, then seconds'
	cargo build --locked --bin nftlet --example demo
	@scripts/netns-run.sh --explain
	@scripts/netns-run.sh "$${CARGO_TARGET_DIR:-target}/debug/examples/demo" \
	    --nftlet "$${NFTLET:-$${CARGO_TARGET_DIR:-target}/debug/nftlet}" $(ARGS)

test: ## Run every check: format, lints, documentation, dependencies, tests
	@scripts/install-deps.sh test
	@scripts/test.sh

bench: ## Measure parts and whole beside kube-proxy's ruleset (release build; asks for root; an hour)
	@scripts/install-deps.sh run
	@NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain
	@SIZES=$(SIZES) DURATION=$(DURATION) scripts/bench.sh $(ARGS)

packets: ## Measure connections beside kube-proxy's ruleset and none: make packets ARGS='--sizes 100,10000'
	@scripts/install-deps.sh run
	@NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain
	NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench packets -- $(ARGS)

scale: ## Measure the whole process against its budgets: make scale SIZES=1000x10,50000x20
	@scripts/install-deps.sh run
	@NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain
	cargo build --release --locked
	@install -D "$${CARGO_TARGET_DIR:-target}/release/nftlet" "$(MEASURED)"
	NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench scale -- \
	    --nftlet "$(MEASURED)" --sizes $(SIZES) $(ARGS)

churn: ## Change 500 endpoints a second with traffic for ten minutes; nothing may fail or grow
	@scripts/install-deps.sh run
	@NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain
	cargo build --release --locked
	@install -D "$${CARGO_TARGET_DIR:-target}/release/nftlet" "$(MEASURED)"
	NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench churn -- \
	    --nftlet "$(MEASURED)" --seconds $(DURATION) $(ARGS)

build: ## Build the release binary, target/release/nftlet
	@scripts/install-deps.sh build
	@echo 'Compiling nftlet optimised: some five minutes on two cores the first time'
	cargo build --release --locked

lint: ## Check format, lints and documentation only
	@scripts/install-deps.sh build
	@scripts/test.sh format lints documentation

install-deps: ## Install what building, testing and the demo need
	@scripts/install-deps.sh test

image: ## Build the container image with docker or podman (IMAGE=name:tag)
	$(DOCKER) build --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) --tag $(IMAGE) .
