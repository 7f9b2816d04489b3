#!/bin/sh
# A phone that is made up, on an x86_64 Linux machine: an `adb` whose phone is a folder, with programs for Arm run by
# qemu-user. It shows that a runner works and what it computes; results say `emulated: true`, times mean nothing.
#   sh benchmarks/android_emulated.sh FOLDER
#   PATH=FOLDER/tools:$PATH pocketvlm bench BUNDLE --on adb:// --on-runner build/onnx/onnx-runner --out there.json
# The processor is a Cortex-A76 and says so in /proc/cpuinfo: what arm_device.sh tells of onnxruntime holds here, too.
# Needs: apt-get install qemu-user-static; leave to make user namespaces (or root)
set -eu
folder=$(mkdir -p "$1/tools" "$1/phone" "$1/sys/devices/system/cpu" && cd "$1" && pwd)

core='BogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n'
printf "processor\t: 0\n$core\nprocessor\t: 1\n$core\n" > "$folder/cpuinfo"
echo 0-1 > "$folder/sys/devices/system/cpu/possible"
echo 0-1 > "$folder/sys/devices/system/cpu/present"

cat > "$folder/tools/adb" <<END
#!/bin/sh
# adb [-s SERIAL] get-state | push FROM TO | shell SCRIPT
[ "\$1" = -s ] && shift 2
place() {
  printf '%s' "\$1" | sed -e 's#/data/local/tmp/pocketvlm#$folder/phone#g' \
    -e 's# \./runner/# qemu-aarch64-static -cpu cortex-a76 ./runner/#'
}
case \$1 in
  get-state) echo device;;
  push) cp "\$2" "\$(place "\$3")";;
  shell) PATH=$folder/tools:\$PATH unshare -rm sh -c '
    mount --bind $folder/cpuinfo /proc/cpuinfo && mount --rbind $folder/sys /sys && exec sh -c "\$1"' sh "\$(place "\$2")";;
esac
END
cat > "$folder/tools/getprop" <<'END'
#!/bin/sh
echo '[ro.product.model]: [made up, qemu-user]'
echo '[ro.product.cpu.abi]: [arm64-v8a]'
echo '[ro.product.cpu.abilist]: [arm64-v8a]'
END
printf '#!/bin/sh\n' > "$folder/tools/dumpsys" # it has no battery and no thermal service
chmod 755 "$folder"/tools/*
echo "PATH=$folder/tools:\$PATH"
