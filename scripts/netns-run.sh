#!/usr/bin/env bash
# Runs a command with the right to create network namespaces:
#
#   netns-run.sh COMMAND...   as it is for root, else in a user namespace, else with sudo
#   netns-run.sh --explain    says which of them, or fails and says why none
#
# With NETNS_RUN_ROOT=1 a user namespace is not enough: some limits are lifted for root only.
set -euo pipefail

# Asks for what the tests do; some systems grant the user namespace, but no rights inside of it.
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
    echo "Network namespaces need root, or user namespaces with their rights, or sudo." >&2
    exit 1
fi

if [[ ${1:-} == --explain ]]; then
    case $way in
    user-namespace) echo "Not root: running in a user namespace of its own (unshare -Urnm)." ;;
    sudo) echo "Not root, and user namespaces have no rights here: running with sudo." ;;
    esac
    exit 0
fi

case $way in
root) exec "$@" ;;
user-namespace)
    # The network is new, too, so that its loopback has to be brought up: tests listen on it.
    exec unshare -Urnm sh -c 'ip link set lo up && exec "$@"' netns-run "$@"
    ;;
sudo)
    # sudo keeps little of the environment; these are what tests look at.
    keep=()
    for name in PATH HOME CI TERM NO_COLOR RUST_BACKTRACE RUST_LOG KUBEBUILDER_ASSETS CARGO \
        CARGO_MANIFEST_DIR CARGO_TARGET_DIR CARGO_PKG_VERSION LD_LIBRARY_PATH NFTLET_MAY_SKIP; do
        if [[ -v $name ]]; then keep+=("$name=${!name}"); fi
    done
    exec sudo env "${keep[@]}" "$@"
    ;;
esac
