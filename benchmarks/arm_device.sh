#!/bin/sh
# An aarch64 device on an x86_64 machine: Debian 12 for arm64 under qemu-user, with an ssh server of its own.
#   sudo sh benchmarks/arm_device.sh FOLDER [PORT]      make it (first time: some minutes) and start it
#   sudo sh benchmarks/arm_device.sh FOLDER stop        end it
# It prints how to reach it. Times measured there are those of an emulator, and bench marks them so.
# The processor is a Cortex-A76, as in a Raspberry Pi 5 and close to a Jetson Orin's. Not qemu's `max`: with its SME
# (qemu 7.2) onnxruntime 1.31.1 computes something else, which the bundle's conformance vectors show.
# Needs: apt-get install debootstrap qemu-user-static openssh-client
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
root=$folder/root
port=${2:-2299}

unmount() {
  for place in proc/cpuinfo proc sys dev; do
    umount "$root/$place" 2>/dev/null || true
  done
}

if [ "$port" = stop ]; then
  if [ -f "$root/run/sshd.pid" ]; then kill "$(cat "$root/run/sshd.pid")" || true; fi
  unmount
  exit
fi

# Arm programs run in qemu; flag F: the interpreter is opened now, so that it need not be inside the root.
formats=/proc/sys/fs/binfmt_misc
[ -e $formats/register ] || mount -t binfmt_misc none $formats
if [ ! -e $formats/qemu-aarch64 ]; then
  magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":qemu-aarch64:M::$magic:$mask:/usr/bin/qemu-aarch64-static:OCF" > $formats/register
fi

if [ ! -f "$folder/made" ]; then
  rm -rf "$root"
  debootstrap --foreign --arch=arm64 --variant=minbase \
    --include=ca-certificates,python3,python3-venv,openssh-server bookworm "$root"
  chroot "$root" /debootstrap/debootstrap --second-stage
  [ -f "$folder/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
  mkdir -p "$root/root/.ssh" && chmod 700 "$root/root/.ssh"
  cp "$folder/key.pub" "$root/root/.ssh/authorized_keys"
  touch "$folder/made"
fi

unmount
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
# What an Arm kernel would say: qemu-user shows this machine's own, at which onnxruntime crashes.
core='BogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n'
printf "processor\t: 0\n$core\nprocessor\t: 1\n$core\n" > "$folder/cpuinfo"
mount --bind "$folder/cpuinfo" "$root/proc/cpuinfo"
mkdir -p "$folder/sys/devices/system/cpu"
echo 0-1 > "$folder/sys/devices/system/cpu/possible"
echo 0-1 > "$folder/sys/devices/system/cpu/present"
mount --bind "$folder/sys" "$root/sys"

cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
mkdir -p "$root/run/sshd"
chroot "$root" /usr/sbin/sshd -p "$port" -o ListenAddress=127.0.0.1 -o PasswordAuthentication=no -o UsePAM=no \
  -o PidFile=/run/sshd.pid -o SetEnv=QEMU_CPU=cortex-a76
echo "[127.0.0.1]:$port $(cut -d' ' -f1,2 "$root/etc/ssh/ssh_host_ed25519_key.pub")" > "$folder/known_hosts"
cat <<END
Put this into ~/.ssh/config, then: pocketvlm bench BUNDLE --on ssh://arm-here
Host arm-here
  HostName 127.0.0.1
  Port $port
  User root
  IdentityFile $folder/key
  IdentitiesOnly yes
  UserKnownHostsFile $folder/known_hosts
END
