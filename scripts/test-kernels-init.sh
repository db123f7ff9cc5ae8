#!/bin/busybox sh
# The first process in a virtual machine of test-kernels.sh. Its root is that of the host, read-only, below
# a tmpfs. Runs /out/run of the host, and writes the status to /out/status.
export PATH=/run/vm:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
bb=/bin/busybox

if [ -d /lower ]; then # still in the initial RAM file system
    $bb modprobe -a virtio_pci virtio_rng 9pnet_virtio 9p overlay
    share=trans=virtio,version=9p2000.L,msize=512000
    $bb mount -t 9p -o "ro,$share,cache=loose" root /lower || $bb poweroff -f
    $bb mount -t tmpfs tmpfs /upper
    $bb mkdir /upper/files /upper/work
    $bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
    cd /root && $bb mkdir -p out proc sys dev run tmp usr/lib/modules
    $bb mount -t 9p -o "$share,cache=none" out out
    for folder in run tmp; do $bb mount -t tmpfs tmpfs $folder; done
    $bb mkdir run/vm && $bb cp /init $bb /bin/modprobe run/vm
    # The kernel passes what it does not know of its command line as variables.
    $bb mount --bind ".$modules" usr/lib/modules
    exec $bb switch_root . /run/vm/busybox sh /run/vm/init
fi

bb=/run/vm/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup
$bb mount -t devtmpfs dev /dev
$bb mkdir -p /dev/pts /dev/shm
$bb mount -t devpts devpts /dev/pts
$bb mount -t tmpfs tmpfs /dev/shm
$bb ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do $bb ln -sf /proc/self/fd/${number%:*} /dev/${number#*:}; done
echo /run/vm/modprobe >/proc/sys/kernel/modprobe
$bb ip link set lo up
bash /out/run
echo $? >/out/status
$bb sync
$bb poweroff -f
