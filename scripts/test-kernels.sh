#!/usr/bin/env bash
# Runs the integration tests on other kernels: Debian's, each in a virtual machine, one after the other.
#
#   test-kernels.sh [ARGUMENT...]    of the test program, for example names of tests
#
# KERNELS      names in kernels.txt, by default all
# RUN          a shell command to run there in place of the tests
# MINUTES      after which a virtual machine is stopped, by default 90
# NFTLET_KERNEL_CACHE    the directory of packages, by default ~/.cache/nftlet/kernels
#
# Nothing is installed: packages are unpacked in the cache, QEMU among them. Uses KVM if it works.
# Exits with 77 if Debian's mirror is out of reach, or the machine cannot unpack its packages.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
repository=$PWD
cache=${NFTLET_KERNEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nftlet/kernels}
minutes=${MINUTES:-90}
# All that tests may skip there: programs that Debian does not have, and rules that only older programs of
# iptables call incompatible.
may_skip='kustomize real-apiserver promtool incompatible-tables'

say() { printf 'test-kernels: %s\n' "$*"; }
fail() { say "$@" >&2; exit 1; }
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
entry() { awk -v kernel="$1" '$1 == kernel { print $2, $3 }' scripts/kernels.txt; }

arguments=("$@")
read -ra kernels <<<"${KERNELS:-$(awk '!/^#/ { printf "%s ", $1 }' scripts/kernels.txt)}"
for kernel in "${kernels[@]}"; do
    [[ $(entry "$kernel") ]] || fail "scripts/kernels.txt has no kernel $kernel"
done
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for needed in /usr/bin/apt-get /usr/bin/dpkg-deb $keyring /lib64/ld-linux-x86-64.so.2; do
    [[ -e $needed ]] || { say "this machine has no $needed"; exit 77; }
done

# --- packages ------------------------------------------------------------------------------------

mkdir -p "$cache"/apt/{lists,archives}/partial "$cache/apt/none" || exit 1
cache=$(realpath "$cache")
exec 9>"$cache/lock"
flock -n 9 || { say "waiting until another run ends"; flock 9; }
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    grep -v '^#' | grep -oE 'https?://[^ ]+/debian/?( |$)' | head -n 1)
mirror=${mirror:-http://deb.debian.org/debian}
: >"$cache/apt/status"
cat >"$cache/apt/conf" <<END
Dir::Etc::SourceList "$cache/apt/sources.list";
Dir::Etc::SourceParts "$cache/apt/none";
Dir::State::Lists "$cache/apt/lists";
Dir::State::Status "$cache/apt/status";
Dir::Cache "$cache/apt";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
END

# Unpacks packages of a suite in a folder: PACKAGE... and all they need, as far as the names match.
unpack() { # FOLDER SUITE PATTERN PACKAGE...
    local folder=$1 suite=$2 pattern=$3 packages package
    shift 3
    export APT_CONFIG=$cache/apt/conf
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$cache/apt/sources.list"
    apt-get update -qq --error-on=any || { say "$mirror is out of reach"; return 77; }
    packages=$(apt-get install --dry-run --no-install-recommends "$@" |
        sed -nE "s/^Inst ($pattern) \(([^ ]+) .*/\1=\2/p")
    [[ $packages ]] || return
    if [[ $packages != "$(cat "$folder/packages" 2>/dev/null)" ]]; then
        say "unpacking $* of Debian $suite"
        rm -rf "$folder" && mkdir -p "$folder" && cd "$folder" || return
        # shellcheck disable=SC2086 # a word for each package
        apt-get download -qq $packages || return
        for package in ./*.deb; do dpkg-deb --extract "$package" . || return; done
        rm ./*.deb
        # The last step, so that a folder with this file is complete.
        echo "$packages" >packages
    fi
}

tools=$cache/tools
[[ -e $tools/packages ]] ||
    (unpack "$tools" bookworm '[^ ]+' qemu-system-x86 busybox-static kmod) || exit
libraries=$tools/lib/x86_64-linux-gnu:$tools/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR=$tools/usr/lib/x86_64-linux-gnu/qemu
# The programs of the packages need their own libraries.
load=("$tools/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$libraries")
qemu=("${load[@]}" "$tools/usr/bin/qemu-system-x86_64" -L "$tools/usr/share/qemu" -L "$tools/usr/share/seabios")
busybox=$tools/bin/busybox

# Unpacks a kernel; sets `modules`, the folder of its modules, and `image`; writes `initrd`.
prepare() { # KERNEL
    local suite version folder=$cache/$1 pattern='linux-[a-z]+-[0-9][^ ]*' needed release
    read -r suite version <<<"$(entry "$1")"
    if [[ $version == - ]]; then
        (unpack "$folder" "$suite" "$pattern" linux-image-amd64) || return
    elif ! grep -qs "=$version$" "$folder/packages" &&
        ! (unpack "$folder" "$suite" "$pattern" "linux-image-amd64=$version"); then
        say "Debian $suite has no linux-image-amd64 $version; taking its newest: change scripts/kernels.txt"
        (unpack "$folder" "$suite" "$pattern" linux-image-amd64) || return
    fi
    [[ -e $folder/lib ]] || ln -s usr/lib "$folder/lib"
    modules=$(echo "$folder"/lib/modules/*)
    release=${modules##*/}
    image=$folder/boot/vmlinuz-$release
    [[ -e $image ]] || image=$modules/vmlinuz
    [[ -e $modules/modules.dep ]] || "${load[@]}" --argv0 depmod "$tools/bin/kmod" -b "$folder" "$release" || return
    initrd=$folder/initrd
    rm -rf "$initrd.files"
    mkdir -p "$initrd.files"/{bin,lower,upper,root,proc} "$initrd.files/lib/modules/$release"
    cp "$busybox" "$initrd.files/bin/busybox"
    cp scripts/test-kernels-init.sh "$initrd.files/init"
    printf '#!/bin/sh\nexec %s --argv0 modprobe %s "$@"\n' "${load[*]}" "$tools/bin/kmod" \
        >"$initrd.files/bin/modprobe"
    chmod +x "$initrd.files/bin/modprobe"
    needed=$(grep -E '/(virtio_pci|virtio_rng|rng-core|virtio-rng|9pnet_virtio|9p|overlay)\.ko[.a-z]*:' \
        "$modules/modules.dep" | tr -d : | tr " " "\n" | sort -u)
    (cd "$modules" && cp --parents modules.* $needed "$initrd.files/lib/modules/$release") || return
    (cd "$initrd.files" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1 >"$initrd") || return
    rm -r "$initrd.files"
}

# --- virtual machines ----------------------------------------------------------------------------

work=$(mktemp -d)
machine=
stop() { [[ -z $machine ]] || kill "$machine" 2>/dev/null; }
trap 'stop; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

# Runs $work/out/run in a virtual machine, for at most some seconds.
boot() { # ACCELERATOR SECONDS
    local share=security_model=none,multidevs=remap cores
    cores=$(nproc)
    rm -f "$work/out/status"
    timeout --kill-after=5 "$2" "${qemu[@]}" -accel "$1" -machine q35,usb=off -nodefaults -no-user-config \
        -cpu max -m 2G -smp $((cores < 4 ? cores : 4)) -nic none -display none -no-reboot -serial stdio \
        -kernel "$image" -initrd "$initrd" -device virtio-rng-pci \
        -fsdev "local,id=root,path=/,readonly=on,$share" -device virtio-9p-pci,fsdev=root,mount_tag=root \
        -fsdev "local,id=out,path=$work/out,$share" -device virtio-9p-pci,fsdev=out,mount_tag=out \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 modules=${modules%/*}" \
        </dev/null &
    machine=$!
    wait "$machine"
    machine=
    [[ -e $work/out/status ]]
}

# Whether KVM works is seen by booting: the device may exist, and fail.
accelerator() {
    mkdir -p "$work/out"
    echo true >"$work/out/run"
    [[ -w /dev/kvm ]] && boot kvm 30 >/dev/null 2>&1 && echo kvm && return
    echo tcg
}

say "building the tests"
program=$(cargo test --locked --test it --no-run --message-format=json-render-diagnostics |
    sed -nE 's/.*"name":"it".*"executable":"([^"]+)".*/\1/p' | tail -n 1)
[[ -x $program ]] || fail "the tests do not compile"

# The kernel loads what nftlet needs by itself, but not what its neighbours need.
tests="for module in sctp br_netfilter ip_vs ip_vs_rr dummy nft_compat ip_set_hash_ip xt_set \
    ip{,6}table_{nat,filter,mangle,raw}; do modprobe \$module; done; '$program' ${arguments[*]@Q}"
accelerated=
failures=0
table=()
for kernel in "${kernels[@]}"; do
    prepare "$kernel"
    status=$?
    ((status == 77)) && exit 77
    ((status)) && fail "cannot unpack Linux $kernel"
    [[ $accelerated ]] || accelerated=$(accelerator)
    release=${modules##*/}
    printf '\n==> Linux %s, %s\n' "$release" "$accelerated"
    rm -f "$work"/out/*
    cat >"$work/out/run" <<END
export HOME=/root CI=true NFTLET_MAY_SKIP='$may_skip'
cd '$repository' || exit
{ ${RUN:-$tests}; echo \$? >/out/passed; } 2>&1 | tee /out/log
exit "\$(cat /out/passed)"
END
    started=$SECONDS
    boot "$accelerated" $((60 * minutes))
    time=$(clock $((SECONDS - started)))
    passed=$(sed -nE 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed.*/\1 \2/p' "$work/out/log" 2>/dev/null)
    read -r passed failed <<<"${passed:-0 -}"
    if [[ $(cat "$work/out/status" 2>/dev/null) != 0 ]]; then
        failures=$((failures + 1))
        say "Linux $release FAILED"
    fi
    skipped=$(sed -nE 's/^SKIPPED in ([^:]+(::[^:]+)*): ([^:]+): (.*)/\3 (\4)/p' "$work/out/log" 2>/dev/null |
        sort | uniq -c | sed -E 's/^ +([0-9]+) (.*)/\1 \2/' | paste -sd ';' | sed 's/;/; /g')
    table+=("| $release | $passed | $failed | ${skipped:-none} | $time |")
done

printf '\n| Kernel | Passed | Failed | Skipped | Time (%s) |\n|---|--:|--:|---|--:|\n' "$accelerated"
printf '%s\n' "${table[@]}"
((failures == 0)) || fail "tests failed on $failures of ${#kernels[@]} kernels"
