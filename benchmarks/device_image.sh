#!/bin/sh
# The image of the Dockerfile's stage `device`, built from that Dockerfile, weighed and asked, without a registry.
#   sudo sh benchmarks/device_image.sh FOLDER BUNDLE PICTURE    (first time: some minutes, most for CPython)
# Its base, python:3.11-slim-bookworm, is made here as the official image's Dockerfile makes it: Debian 12 slimmed by
# Debian's own rules (debuerreotype, which makes debian:bookworm-slim), CPython from source into /usr/local, without
# tests, compiled files and static libraries. It differs in that CPython is Debian's source of it (3.11.2), compiled
# without --enable-optimizations and --with-lto, and that pip is the one that comes with it.
# buildah runs the Dockerfile; it needs no engine and no daemon. Everything lies in FOLDER, about 2 GB.
# Needs: apt-get install --no-install-recommends debuerreotype debootstrap buildah
set -eu
code=$(cd "$(dirname "$0")/.." && pwd)
bundle=$(cd "$2" && pwd)
picture=$(realpath "$3")
folder=$(mkdir -p "$1" && cd "$1" && pwd)
root=$folder/root
builder=$folder/builder
mirror=${MIRROR:-$(apt-get indextargets --format '$(SITE)' | grep -m 1 "/debian$")}  # this machine's, if it is a Debian
base=docker.io/library/python:3.11-slim-bookworm

# --- the base -----------------------------------------------------------------------------------

if [ ! -f "$folder/made" ]; then
  rm -rf "$root" "$builder"
  debuerreotype-init --non-debian --keyring /usr/share/keyrings/debian-archive-keyring.gpg "$root" bookworm "$mirror"
  debuerreotype-minimizing-config "$root"
  debuerreotype-apt-get "$root" update
  debuerreotype-apt-get "$root" install -y --no-install-recommends ca-certificates netbase tzdata
  cp -a "$root" "$builder"

  echo "deb-src $mirror bookworm main" >> "$builder/etc/apt/sources.list"
  cat > "$builder/cpython.sh" <<'END'
set -eu
apt-get update
apt-get install -y --no-install-recommends dpkg-dev gcc libbluetooth-dev libbz2-dev libc6-dev libdb-dev libffi-dev \
  libgdbm-dev liblzma-dev libncursesw5-dev libreadline-dev libsqlite3-dev libssl-dev make tk-dev uuid-dev xz-utils zlib1g-dev
cd /tmp
apt-get source --download-only python3.11
mkdir python
tar -xf python3.11_*.orig.tar.* --strip-components=1 -C python
cd python
./configure --build="$(dpkg-architecture --query DEB_BUILD_GNU_TYPE)" --enable-loadable-sqlite-extensions \
  --enable-option-checking=fatal --enable-shared --with-ensurepip
cflags=$(dpkg-buildflags --get CFLAGS)
ldflags="$(dpkg-buildflags --get LDFLAGS),--strip-all"
make -j"$(nproc)" EXTRA_CFLAGS="$cflags" LDFLAGS="$ldflags"
rm python
make EXTRA_CFLAGS="$cflags" LDFLAGS="$ldflags,-rpath='\$\$ORIGIN/../lib'" python
make install
cd /
find /usr/local -depth \( \( -type d -a \( -name test -o -name tests -o -name idle_test \) \) \
  -o \( -type f -a \( -name '*.pyc' -o -name 'libpython*.a' \) \) \) -exec rm -rf '{}' +
ln -sf python3 /usr/local/bin/python
ln -sf pip3 /usr/local/bin/pip
find /usr/local -type f -executable -not -name '*tkinter*' -exec ldd '{}' ';' 2>/dev/null \
  | awk '/=>/ { so = $(NF-1); if (index(so, "/usr/local/") != 1) { gsub("^/(usr/)?", "", so); print "*" so } }' \
  | sort -u | xargs dpkg-query --search | cut -d: -f1 | sort -u > /needed
END
  debuerreotype-chroot "$builder" sh /cpython.sh
  debuerreotype-apt-get "$root" install -y --no-install-recommends $(cat "$builder/needed")
  cp -a "$builder/usr/local/." "$root/usr/local/"
  chroot "$root" ldconfig
  rm -rf "$builder" "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin
  debuerreotype-slimify "$root"
  touch "$folder/made"
fi

# --- the Dockerfile -----------------------------------------------------------------------------

store() { buildah --root "$folder/store" --runroot "$folder/run" --storage-driver vfs "$@"; }
weigh() { du -s --block-size=1 $2 "$1" | cut -f1 | awk '{ printf "%.1f MB\n", $1 / 1e6 }'; }

rm -rf "$folder/store" "$folder/run"
container=$(store from scratch)
store add -q "$container" "$root" / > /dev/null
store config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 "$container"
store commit -q --rm "$container" "$base" > /dev/null

# This machine's certificates and pip configuration, should it have its own.
certificates=/etc/ssl/certs/ca-certificates.crt
printf '[global]\ncert = %s\n' $certificates > "$folder/pip.conf"
store build -q --isolation chroot --pull-never --layers --target device -t pocketvlm:device \
  -v "$certificates:$certificates:ro" -v "$folder/pip.conf:/etc/pip.conf:ro" "$code" > /dev/null

# --- the image ----------------------------------------------------------------------------------

container=$(store from --pull-never localhost/pocketvlm:device)
image=$(store mount "$container")
echo "base: $(weigh "$root" --apparent-size), on disk $(weigh "$root" '')"
echo "image: $(weigh "$image" --apparent-size), on disk $(weigh "$image" '')"
echo "of it /usr/local/pocketvlm: $(weigh "$image/usr/local/pocketvlm" --apparent-size)"
# As the image's own user.
ask() { store run --isolation chroot -v "$bundle:/bundle:ro" -v "$picture:/picture:ro" "$container" -- "$@"; }
ask id
ask sh -c 'for name in torch transformers onnx; do ! python -c "import $name" 2>/dev/null || echo "has $name"; done'
ask pocketvlm doctor /bundle
ask pocketvlm run /bundle --image /picture "what shape is it?"
store umount "$container" > /dev/null
