# nftlet's tasks. `make` alone lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test bench build lint install-deps image

# Rust that was installed for this user only need not be on PATH, nor need `nft` and `ip`.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
IMAGE   ?= nftlet:$(VERSION)
DOCKER  ?= $(shell command -v docker || command -v podman || echo docker)
# Arguments for the demo and for the measurements in the kernel: make bench ARGS='--sizes 1000'
ARGS    ?=

help: ## List the tasks
	@printf 'nftlet %s\n\nUsage: make TASK\n\n' '$(VERSION)'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Show services, failover and rejects in network namespaces (two minutes)
	@scripts/install-deps.sh run
	@echo 'Building nftlet and the demo ...'
	@cargo build --quiet --bin nftlet --example demo
	@scripts/netns-run.sh --explain
	@scripts/netns-run.sh "$${CARGO_TARGET_DIR:-target}/debug/examples/demo" \
	    --nftlet "$${NFTLET:-$${CARGO_TARGET_DIR:-target}/debug/nftlet}" $(ARGS)

test: ## Run every check: format, lints, documentation, dependencies, tests
	@scripts/install-deps.sh test
	@scripts/test.sh

bench: ## Measure beside kube-proxy's ruleset (release build; asks for root; 5 minutes)
	@scripts/install-deps.sh run
	@NETNS_RUN_ROOT=1 scripts/netns-run.sh --explain
	cargo bench --locked --bench micro
	NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench dataplane -- $(ARGS)
	NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench conntrack

build: ## Build the release binary, target/release/nftlet
	@scripts/install-deps.sh build
	cargo build --release --locked

lint: ## Check format, lints and documentation only
	@scripts/install-deps.sh build
	@scripts/test.sh format lints documentation

install-deps: ## Install what building, testing and the demo need
	@scripts/install-deps.sh test

image: ## Build the container image with docker or podman (IMAGE=name:tag)
	$(DOCKER) build --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) --tag $(IMAGE) .
