#!/usr/bin/env bash
# Checks, without a registry and docker, that the image contains what nftlet needs: assembles the
# files of the Dockerfile and the packages of its base that nftlet relies upon, searches the libraries
# of every program, and runs nftlet and the programs of iptables in that root.
#
# Usage: check-image.sh [NFTLET]    (a built binary, by default target/debug/nftlet)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

nftlet=${1:-${CARGO_TARGET_DIR:-target}/debug/nftlet}
# What nftlet relies upon in gcr.io/distroless/cc-debian12, which has no shell.
base=gcr.io/distroless/cc-debian12
base_packages=(libc6 libgcc-s1)

fail() { printf 'check-image: %s\n' "$@" >&2; exit 1; }
say() { printf 'check-image: %s\n' "$*"; }

[[ -x $nftlet ]] || fail "there is no $nftlet; build it first"
[[ $(sed -n 's/^FROM //p' Dockerfile | tail -n 1) == "$base" ]] ||
    fail "the Dockerfile has another base than $base; say here what of it is relied upon"
grep -q '^COPY --from=builder /runtime/ /$' Dockerfile && grep -q 'scripts/image-root.sh' Dockerfile ||
    fail "the Dockerfile does not take the runtime files from scripts/image-root.sh"
for tool in dpkg-deb readelf unshare; do
    if ! command -v "$tool" >/dev/null; then
        say "SKIPPED: no $tool here"
        exit 77
    fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
architecture=$(dpkg --print-architecture)

# --- the root ------------------------------------------------------------------------------------

assemble() {
    rm -rf "$work/root" && mkdir "$work/root" &&
        scripts/image-root.sh "$work/root" "$nftlet" "$architecture" "$1"
}
release=$(. /etc/os-release && echo "${PRETTY_NAME:-$ID}")
if assemble archive 2>"$work/log"; then
    say "the packages come from the archive of $release"
else
    say "the archive is out of reach ($(tail -n 1 "$work/log")); this host's files stand in for it"
    if ! assemble host; then
        say "SKIPPED: the packages are not installed here either"
        exit 77
    fi
fi
grep -q '^ID=debian$' /etc/os-release && grep -q '^VERSION_ID="12"$' /etc/os-release ||
    say "the image is made of Debian 12, this is $release: libraries may be others"
image=$(du --summarize --apparent-size --block-size=K "$work/root" | cut -f 1)
own=$(find "$work/root" -type f -o -type l | sort)
# The binary was linked with this host's C library.
for package in "${base_packages[@]}"; do
    dpkg-query --listfiles "$package:$architecture" | grep -E '\.so(\.[0-9]+)*$' |
        while read -r file; do
            install -D "$(realpath "$file")" "$work/root/usr/lib/${file#*/lib*/}"
        done
done
# Programs contain the path of the loader.
loader=$(readelf --program-headers "$nftlet" | sed -n 's/.*program interpreter: \(.*\)]/\1/p')
install -D "$(realpath "$loader")" "$work/root$loader"

# --- libraries -----------------------------------------------------------------------------------

is_elf() { [[ $(head -c 4 "$1" | tail -c 3) == ELF ]]; }
needed() { readelf --dynamic "$1" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
found=$(find "$work/root" -name '*.so*' -printf '%f\n')
missing=() used=()
while read -r file; do
    if [[ -L $file ]] || ! is_elf "$file"; then
        continue
    fi
    for library in $(needed "$file"); do
        used+=("$library")
        grep --quiet --line-regexp --fixed-strings "$library" <<<"$found" ||
            missing+=("${file#"$work/root"} needs $library")
    done
done <<<"$own"
((${#missing[@]} == 0)) || fail "${missing[@]}"
# Each library is used by nftlet, iptables or another library.
while read -r file; do
    name=$(basename "$file")
    [[ $file == */xtables/* || $name != lib*.so.[0-9] && $name != lib*.so.[0-9][0-9] ]] ||
        [[ " ${used[*]} " == *" $name "* ]] || fail "nothing uses ${file#"$work/root"}"
done <<<"$own"
say "every library of $(grep -c . <<<"$own") files ($image) is there"

# --- in the root ---------------------------------------------------------------------------------

cp --recursive examples/shop "$work/root/shop"
inside() { unshare --map-root-user --net chroot "$work/root" "$@"; }
unshare --map-root-user --net true 2>/dev/null || {
    [[ $EUID -eq 0 ]] || { say "SKIPPED: neither root nor user namespaces"; exit 77; }
    inside() { chroot "$work/root" "$@"; }
}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
[[ $(inside /usr/bin/nftlet --version) =~ ^"nftlet $version"( \([0-9a-f]+\))?$ ]] ||
    fail "nftlet --version says: $(inside /usr/bin/nftlet --version)"
arguments=(--dry-run --hostname-override node-1 --manifests)
inside /usr/bin/nftlet "${arguments[@]}" /shop >"$work/inside" 2>"$work/log" ||
    fail "nftlet does not run in it: $(cat "$work/log")"
"$nftlet" "${arguments[@]}" examples/shop >"$work/outside" 2>/dev/null
cmp "$work/inside" "$work/outside" || fail "a dry run says something else than outside"
for program in "$work/root/usr/sbin/"*-{save,restore}; do
    program=/usr/sbin/$(basename "$program")
    [[ $(inside "$program" --version) == *tables* ]] || fail "$program does not run in it"
done
[[ -z $(find "$work/root" -name sh -o -name bash -o -name busybox) ]] || fail "there is a shell in it"
say "nftlet and the programs of iptables run in it"
