#!/bin/sh
# Builds the image without a daemon and without a registry, and tries it: as root on Debian 12, after
#   apt-get install buildah debootstrap
# Arguments go to `buildah build`, as --volume FOLDER:FOLDER:ro and --env PIP_FIND_LINKS=FOLDER for wheels on this disk.
set -eu
cd "$(dirname "$0")/.."
base=$(mktemp -d)
trap 'rm -rf "$base"' EXIT
export STORAGE_DRIVER=vfs

# What python:3.11-slim is to the Dockerfile.
debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$base/root"
ln -s python3 "$base/root/usr/bin/python"
rm "$base/root/usr/lib/python3.11/EXTERNALLY-MANAGED"
# Certificates that this machine trusts, and where it finds names.
cp /etc/ssl/certs/ca-certificates.crt "$base/root/etc/ssl/certs/"
cp /etc/resolv.conf "$base/root/etc/"
container=$(buildah from scratch)
buildah copy --quiet "$container" "$base/root" /
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet "$container" docker.io/library/python:3.11-slim
buildah rm "$container"

buildah build --layers --pull=never --isolation chroot --build-arg TORCH=torch==2.13.0 --tag ciphertune \
    --file deploy/Dockerfile "$@" .

container=$(buildah from --pull=never localhost/ciphertune)
buildah run --isolation chroot "$container" -- \
    ciphertune bench kernel --to mlwe --tokens 64 --in-features 64 --out-features 64 --repeat 2
buildah rm "$container"
