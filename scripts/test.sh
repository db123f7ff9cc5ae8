#!/usr/bin/env bash
# Runs the checks and prints a summary. Fails if any of them fails.
# Usage: test.sh [format|lints|documentation|dependencies|advisories|tests|image|kernels]...
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
else
    bold='' red='' green='' yellow='' plain=''
fi

format() { cargo fmt --all --check; }
lints() { cargo clippy --locked --workspace --all-targets -- -D warnings; }
documentation() { RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps; }
dependencies() { cargo deny --locked check licenses bans sources; }

advisories() {
    local database=https://github.com/RustSec/advisory-db
    if ! curl --silent --fail --head --location --max-time 15 --output /dev/null "$database"; then
        echo "SKIPPED: the advisory database is unreachable: $database"
        return 77
    fi
    cargo deny --locked check advisories
}

tests() {
    scripts/netns-run.sh --explain || return
    # Tests that measure time run last and alone.
    scripts/with-runner.sh cargo test --locked -- --skip timed:: &&
        scripts/with-runner.sh cargo test --locked --test it timed::
}

image() {
    cargo build --locked --bin nftlet && scripts/check-image.sh
}

# Only by its name. On an older kernel: what this one may lack, packets, conntrack, healing and clean-up.
# Migrations are left out, in which requests were lost on an emulated processor.
kernels() {
    KERNELS=6.1 MINUTES=20 scripts/test-kernels.sh kernel::features kernel::nflog \
        kernel::healing::every kernel::tables::netlink kernel::tables::what_nft deploy::cleanup \
        laboratory::all_machines services::packets services::conntrack \
        policies::alone::services_of_ipvs policies::bridge policies::directions \
        policies::ports_and_blocks::sctp
}

steps=("$@")
((${#steps[@]})) || steps=(format lints documentation dependencies advisories tests image)

# Minutes and seconds.
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

failures=0
summary=()
for step in "${steps[@]}"; do
    printf '\n%s==> %s%s\n' "$bold" "$step" "$plain"
    start=$SECONDS
    "$step"
    status=$?
    time=$(clock $((SECONDS - start)))
    case $status in
    0) colour=$green result=passed ;;
    77) colour=$yellow result=SKIPPED ;;
    *) colour=$red result=FAILED; failures=$((failures + 1)) ;;
    esac
    printf '%s    %s: %s after %s%s\n' "$colour" "$step" "$result" "$time" "$plain"
    summary+=("$(printf '%s%-14s  %-8s  %6s%s' "$colour" "$step" "$result" "$time" "$plain")")
done

printf '\n%s%-14s  %-8s  %6s%s\n' "$bold" CHECK RESULT TIME "$plain"
printf '%s\n' "${summary[@]}"
printf '%-14s  %-8s  %6s\n' total "" "$(clock $SECONDS)"
if ((failures)); then
    printf '\n%s%d of %d checks failed.%s\n' "$red" "$failures" "${#steps[@]}" "$plain"
    exit 1
fi
