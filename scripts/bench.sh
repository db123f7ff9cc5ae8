#!/usr/bin/env bash
# Runs benchmarks one after the other, and lists the missed budgets at the end.
#
#   bench.sh [SCENE...] [-- ARGUMENTS]    without names: all scenes and `micro`
#
# ARGUMENTS go to each scene. Results are written to the directory RESULTS, by default
# benches/results. SIZES changes the clusters of `first` and `changes`; DURATION the seconds for which
# `changes` and `churn` send changes by the clock. KUBE_PROXY names a kube-proxy to compare with.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
command -v python3 >/dev/null || { echo 'bench.sh needs python3' >&2; exit 1; }

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
results=${RESULTS:-benches/results}
scenes=()
while (($#)) && [[ $1 != -- ]]; do scenes+=("$1") && shift; done
(($#)) && shift
named=("${scenes[@]}")
((${#scenes[@]})) ||
    scenes=(micro first changes policies packets conntrack neighbours ranges insight reach churn)

echo '==> building'
cargo build --release --locked && cargo bench --locked --no-run || exit 1
# `cargo bench` writes a different program to the usual path.
measured=$target/measured/nftlet
install -D "$target/release/nftlet" "$measured" || exit 1

failed=()
for scene in "${scenes[@]}"; do
    printf '\n==> %s\n' "$scene"
    if [[ $scene == micro ]]; then
        export CRITERION_HOME=$target/measured/criterion
        rm -rf "$CRITERION_HOME"
        cargo bench --locked --bench micro && scripts/bench-report.py micro "$CRITERION_HOME" "$results" ||
            failed+=(micro)
        continue
    fi
    arguments=()
    case $scene in
    first | changes) [[ -z ${SIZES:-} ]] || arguments=(--sizes "$SIZES") ;;
    esac
    case $scene in
    changes | churn) [[ -z ${DURATION:-} ]] || arguments+=(--seconds "$DURATION") ;;
    esac
    NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench perf -- "$scene" \
        --nftlet "$measured" --results "$results" "${arguments[@]}" "$@" || failed+=("$scene")
done

printf '\n==> budgets\n'
scripts/bench-report.py budgets "$results" "${named[@]}"
budgets=$?
if ((${#failed[@]})); then
    printf 'Missed a budget, or failed: %s. See above.\n' "${failed[*]}"
    exit 1
fi
exit "$budgets"
