#!/usr/bin/env bash
# Runs all benchmarks, one after the other, and says in the end which budgets were missed and which
# were not measured. Arguments go to the benchmark `dataplane`. SIZES names the clusters of the
# benchmark `scale`, DURATION the seconds of `churn`.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
measured=$target/measured/nftlet
results=$PWD/benches/results
expected=benches/budgets/expected.txt
export NFTLET_BENCH_BUDGETS=$target/measured/budgets.tsv
export CRITERION_HOME=$target/measured/criterion

echo '==> building'
cargo build --release --locked && cargo bench --locked --no-run || exit 1
# `cargo bench` puts a program of its own in the usual place.
install -D "$target/release/nftlet" "$measured" || exit 1
rm -rf "$CRITERION_HOME"
: >"$NFTLET_BENCH_BUDGETS" || exit 1

failed=()
run() {
    local name=$1 ended=0
    shift
    printf '\n==> %s\n' "$name"
    NETNS_RUN_ROOT=1 scripts/with-runner.sh cargo bench --locked --bench "$name" -- "$@" || ended=1
    ((ended == 0)) || failed+=("$name")
    # One that notes no budget by itself is one budget as a whole, if there is such a one.
    if grep -q "^$name | all of its budgets" "$expected" &&
        ! grep -q "	$name | " "$NFTLET_BENCH_BUDGETS"; then
        printf '%s\t%s | all of its budgets\t%s\tmet\t\n' \
            "$( ((ended == 0)) && echo met || echo missed)" "$name" \
            "$( ((ended == 0)) && echo met || echo 'see its table')" >>"$NFTLET_BENCH_BUDGETS"
    fi
}

NFTLET_BENCH_JSON=$results/micro.json run micro
run dataplane --json "$results/dataplane.json" "$@"
run conntrack --json "$results/conntrack.json"
run policies --json "$results/policies.json"
run packets --json "$results/packets.json"
run neighbours --json "$results/neighbours.json"
run ranges
run scale --nftlet "$measured" --sizes "${SIZES:-1000x10,10000x10,30000x10,50000x20}"
run churn --nftlet "$measured" --seconds "${DURATION:-600}" --json "$results/churn.json"

printf '\n==> budgets\n'
# Both files are read: what was promised, and what was noted of it.
awk -F '\t' '
    FNR == NR {
        if ($0 !~ /^#/ && split($0, part, " \\| ") >= 2)
            wanted[++count] = part[1] " | " part[2]
        next
    }
    {
        noted[$2] = $1
        sub(/ \| /, ": ", $2)
        if ($1 == "missed")
            missed[++misses] = $2 " is " $3 ", budget " $4 ($5 == "" ? "" : " (" $5 ")")
    }
    END {
        for (i = 1; i <= count; i++) {
            if (wanted[i] in noted) { met += noted[wanted[i]] == "met"; continue }
            sub(/ \| /, ": ", wanted[i])
            print "not measured: " wanted[i]
            absent++
        }
        for (i = 1; i <= misses; i++) print "missed: " missed[i]
        if (!misses && !absent) print "Every budget is met: " met "."
        else printf "%d of %d budgets met, %d missed, %d not measured.\n", met, count, misses, absent
        exit misses || absent
    }' "$expected" "$NFTLET_BENCH_BUDGETS"
met=$?
if ((${#failed[@]})); then
    printf 'Missed a budget, or failed: %s. See above.\n' "${failed[*]}"
    exit 1
fi
exit "$met"
