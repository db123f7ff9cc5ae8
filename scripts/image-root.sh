#!/usr/bin/env bash
# Puts into a directory what the image has on top of its base: nftlet, the libraries that the base
# lacks, and the programs of iptables that nftlet calls, with which it removes what kube-proxy left.
# Each package brings its licence, and the entry by which scanners of images know it.
#
# Usage: image-root.sh DIRECTORY NFTLET ARCHITECTURE [archive|host]
#
#   archive  takes the packages from Debian's archive, for any of its architectures
#   host     takes the files of the packages that are installed here
#
# The Dockerfile and check-image.sh both use it, so that what is checked is what is shipped.
set -euo pipefail

directory=$1 nftlet=$2 architecture=$3 from=${4:-archive}
packages=(libmnl0 libnftnl11 iptables libip4tc2 libip6tc2 libnetfilter-conntrack3 libnfnetlink0
    libxtables12)
programs=()
for family in iptables ip6tables; do
    for kind in legacy nft; do
        for action in save restore; do
            programs+=("$family-$kind-$action")
        done
    done
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# --- the files of the packages, in $work/root, and what they say of themselves in $work/status ---

mkdir "$work/root" "$work/status"
if [[ $from == archive ]]; then
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download \
        "${packages[@]/%/:$architecture}")
    for package in "${packages[@]}"; do
        dpkg-deb --extract "$work/${package}_"*.deb "$work/root"
        dpkg-deb --field "$work/${package}_"*.deb >"$work/status/$package"
    done
else
    for package in "${packages[@]}"; do
        dpkg-query --listfiles "$package:$architecture" | while read -r file; do
            [[ -d $file ]] || (cd / && cp --archive --parents ".$file" "$work/root")
        done
        dpkg-query --status "$package:$architecture" >"$work/status/$package"
    done
fi
# Some packages have /lib, which is a link to /usr/lib elsewhere.
if [[ -d $work/root/lib && ! -L $work/root/lib ]]; then
    cp --archive "$work/root/lib" "$work/root/usr/"
fi

# --- of those, what is used ----------------------------------------------------------------------

install -D "$nftlet" "$directory/usr/bin/nftlet"
mkdir -p "$directory/usr/lib" "$directory/usr/sbin" "$directory/var/lib/dpkg/status.d"
cp --archive "$work/root/usr/lib/." "$directory/usr/lib/"
cp "$work/root/usr/sbin/"xtables-{legacy,nft}-multi "$directory/usr/sbin/"
for program in "${programs[@]}"; do
    ln --symbolic "xtables-$(cut -d - -f 2 <<<"$program")-multi" "$directory/usr/sbin/$program"
done
for package in "${packages[@]}"; do
    install -D --mode 644 "$work/root/usr/share/doc/$package/copyright" \
        "$directory/usr/share/doc/$package/copyright"
    install --mode 644 "$work/status/$package" "$directory/var/lib/dpkg/status.d/$package"
done
