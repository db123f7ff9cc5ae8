#!/usr/bin/env bash
# Runs a command that may create network namespaces:
#
#   netns-run.sh COMMAND...   directly as root, else in a user namespace, else with sudo
#   netns-run.sh --explain    prints which of these it uses, or fails with the reason
#
# With NETNS_RUN_ROOT=1 it uses no user namespace: some limits are lifted for root only.
set -euo pipefail

# Tries what the tests do: some systems permit a user namespace, but no capabilities in it.
user_namespace_works() {
    unshare -Urnm ip link set lo up 2>/dev/null
}

if [[ $EUID -eq 0 ]]; then
    way=root
elif [[ -z ${NETNS_RUN_ROOT:-} ]] && user_namespace_works; then
    way=user-namespace
elif command -v sudo >/dev/null; then
    way=sudo
else
    echo "Network namespaces need root, user namespaces with capabilities, or sudo." >&2
    exit 1
fi

if [[ ${1:-} == --explain ]]; then
    case $way in
    user-namespace) echo "Not root: running in a new user namespace (unshare -Urnm)." ;;
    sudo) echo "Not root, and user namespaces have no capabilities: running with sudo." ;;
    esac
    exit 0
fi

case $way in
root) exec "$@" ;;
user-namespace)
    # The network namespace is new as well: tests need its loopback up.
    exec unshare -Urnm sh -c 'ip link set lo up && exec "$@"' netns-run "$@"
    ;;
sudo)
    # sudo resets the environment; tests and benchmarks read these variables.
    keep=()
    for name in PATH HOME CI TERM NO_COLOR RUST_BACKTRACE RUST_LOG KUBEBUILDER_ASSETS CARGO \
        CARGO_MANIFEST_DIR CARGO_TARGET_DIR CARGO_PKG_VERSION LD_LIBRARY_PATH NFTLET_MAY_SKIP \
        KUBE_PROXY; do
        if [[ -v $name ]]; then keep+=("$name=${!name}"); fi
    done
    exec sudo env "${keep[@]}" "$@"
    ;;
esac
