#!/usr/bin/env bash
# Runs all benchmarks, one after the other, and says in the end which of them missed a budget.
# Arguments go to the benchmark `dataplane`. SIZES names the clusters of the benchmark `scale`.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

target=${CARGO_TARGET_DIR:-target}
measured=$target/measured/nftlet

echo '==> building'
cargo build --release --locked && cargo bench --locked --no-run || exit 1
# `cargo bench` puts a program of its own in the usual place.
install -D "$target/release/nftlet" "$measured" || exit 1

failed=()
run() {
    local name=$1
    shift
    printf '\n==> %s\n' "$name"
    NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench "$name" -- "$@" ||
        failed+=("$name")
}

run micro
run dataplane "$@"
run conntrack
run policies
run packets
run neighbours
run scale --nftlet "$measured" --sizes "${SIZES:-10000x10}"
run churn --nftlet "$measured" --seconds 60

if ((${#failed[@]})); then
    printf '\nMissed a budget, or failed: %s. See above.\n' "${failed[*]}"
    exit 1
fi
printf '\nEvery budget is met.\n'
