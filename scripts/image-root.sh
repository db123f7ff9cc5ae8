#!/usr/bin/env bash
# Writes to a directory what the image adds to its base: nftlet, the libraries that the base lacks,
# and the programs of iptables with which nftlet removes kube-proxy's rules. Each package comes with
# its licence and its entry for image scanners.
#
# Usage: image-root.sh DIRECTORY NFTLET ARCHITECTURE [archive|host]
#
#   archive  downloads the packages from Debian's archive, for any of its architectures
#   host     copies the files of the installed packages
#
# The Dockerfile and check-image.sh both use it, so that the check covers the files of the image.
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

# --- the files of the packages in $work/root, their metadata in $work/status -----------------------

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
# Some packages use /lib, which is a link to /usr/lib in the image.
if [[ -d $work/root/lib && ! -L $work/root/lib ]]; then
    cp --archive "$work/root/lib" "$work/root/usr/"
fi

# --- the used files of them ----------------------------------------------------------------------

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
