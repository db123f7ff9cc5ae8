#!/usr/bin/env bash
# Runs a cargo command so that the programs it runs (not the build) may create network namespaces.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if [[ $EUID -ne 0 ]]; then
    host=$(rustc -vV | sed -n 's/^host: //p')
    name=${host//-/_}
    export "CARGO_TARGET_${name^^}_RUNNER=$here/netns-run.sh"
fi
exec "$@"
