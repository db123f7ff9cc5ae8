#!/usr/bin/env bash
# Installs missing dependencies and prints what it does. Usage: install-deps.sh build|run|test
#
#   build   for compiling: a C compiler, pkg-config, libnftnl, libmnl, Rust
#   run     in addition for the demo: nft, ip, nsenter
#   test    in addition for the checks: cargo-deny; iptables, ipset and ipvsadm, with which tests
#           write kube-proxy's rules; Chromium, for the page of nftlet reach; and promtool, if
#           Debian's package has it
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

purpose=${1:-test}
case $purpose in
build | run | test) ;;
*) echo "usage: $0 build|run|test" >&2; exit 2 ;;
esac

cargo_deny=0.20.2
toolchain=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
oldest_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

say() { printf 'install-deps: %s\n' "$*"; }
fail() { printf 'install-deps: %s\n' "$@" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

can_be_root() { [[ $EUID -eq 0 ]] || have sudo; }

# Runs a command as root, with sudo if necessary, and prints it.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    else
        say "with sudo: $*"
        sudo "$@"
    fi
}

# --- packages of the distribution ------------------------------------------------------------

missing=()
need() { missing+=("$1"); }
have cc || need gcc
# A compiler without libc's headers and start files cannot link.
if have cc && ! echo 'int main(void){return 0;}' | cc -xc -o /dev/null - 2>/dev/null; then
    need libc6-dev
elif ! have cc; then
    need libc6-dev
fi
have pkg-config || need pkg-config
if have pkg-config; then
    pkg-config --exists libnftnl || need libnftnl-dev
    pkg-config --exists libmnl || need libmnl-dev
else
    need libnftnl-dev
    need libmnl-dev
fi
if [[ $purpose != build ]]; then
    have nft || need nftables
    have ip || need iproute2
    have nsenter || need util-linux
fi
if [[ $purpose == test ]]; then
    { have iptables-nft-save && have iptables-legacy-save; } || need iptables
    have ipset || need ipset
    have ipvsadm || need ipvsadm
    have chromium || need chromium
    have chromedriver || need chromium-driver
fi
have git || need git
if ! have cargo || [[ $purpose == test ]]; then
    have curl || need curl
    [[ -e /etc/ssl/certs/ca-certificates.crt || ! -e /etc/debian_version ]] || need ca-certificates
fi

apt_updated=
apt_install() {
    can_be_root || fail "packages are missing, and there is neither root nor sudo to install them." \
        "Run as root: apt-get update && apt-get install $*"
    if [[ -z $apt_updated ]]; then
        say "updating the package lists"
        as_root apt-get update -qq
        apt_updated=yes
    fi
    say "installing: $*"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if ((${#missing[@]})); then
    if have apt-get; then
        apt_install "${missing[@]}"
    else
        fail "these packages are missing (Debian's names): ${missing[*]}" \
            "Elsewhere libnftnl-dev and libmnl-dev are usually called libnftnl-devel and libmnl-devel." \
            "Install them and run this again."
    fi
fi

# --- Rust --------------------------------------------------------------------------------------

# Succeeds if version $1 is at least version $2.
at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

install_rustup() {
    # The distribution's package would replace a cargo that came from the distribution.
    if have apt-get && can_be_root && ! have cargo && apt_has_rustup; then
        apt_install rustup
    else
        say "installing rustup for this user with the official installer (https://rustup.rs)"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
            RUSTUP_INIT_SKIP_PATH_CHECK=yes sh -s -- -y -q --no-modify-path --profile minimal --default-toolchain none
    fi
    hash -r
}

apt_has_rustup() {
    apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]' && return
    # The lists may be empty on a fresh machine.
    [[ -z $apt_updated ]] || return 1
    say "updating the package lists"
    as_root apt-get update -qq
    apt_updated=yes
    apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]'
}

if ! have rustup; then
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2 || true)
    if [[ -z $version ]]; then
        say "Rust is missing"
        install_rustup
    elif ! at_least "$version" "$oldest_rust"; then
        say "Rust $version is older than $oldest_rust"
        install_rustup
    elif [[ $purpose == test ]] && ! { have cargo-fmt && have cargo-clippy; }; then
        say "Rust $version has no rustfmt and clippy"
        install_rustup
    else
        say "using Rust $version without rustup; the project is checked with $toolchain"
    fi
fi
if have rustup; then
    installed() { rustup run "$toolchain" "$@" >/dev/null 2>&1; }
    if ! { installed rustc --version && installed cargo-fmt --version &&
        installed cargo-clippy --version; }; then
        say "installing the Rust toolchain $toolchain"
        rustup toolchain install "$toolchain" \
            --profile minimal --component rustfmt --component clippy
    fi
fi

# --- tools of the checks -------------------------------------------------------------------------

if [[ $purpose == test ]] && ! have cargo-deny; then
    say "building cargo-deny $cargo_deny (a few minutes, once)"
    # Optimised for a short build, since it runs for a second.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=false \
        cargo install --locked "cargo-deny@$cargo_deny"
fi
# The package would also start Prometheus, so only promtool is extracted.
install_promtool() {
    local folder
    if [[ -z $apt_updated ]]; then
        as_root apt-get update -qq || return
        apt_updated=yes
    fi
    folder=$(mktemp -d) || return
    (
        trap 'rm -rf "$folder"' EXIT
        cd "$folder" && apt-get download -qq prometheus 2>/dev/null &&
            dpkg-deb --extract prometheus_*.deb . &&
            install -D usr/bin/promtool "${CARGO_HOME:-$HOME/.cargo}/bin/promtool"
    )
}

if [[ $purpose == test ]] && ! have promtool; then
    say "taking promtool out of the distribution's package prometheus"
    { have apt-get && can_be_root && install_promtool; } ||
        say "promtool cannot be had; the test of alerts is left out"
fi

say "everything needed to $purpose is here"
