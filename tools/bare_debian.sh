#!/bin/sh
# A bare Debian in a directory, and commands in it as a user who has just come: what a reader of the README has.
#
#   tools/bare_debian.sh make DIRECTORY [PACKAGE ...]    Debian's smallest system, `python3`, `ca-certificates` and these;
#       SUITE=bookworm makes Debian 12, trixie (the default) Debian 13
#   tools/bare_debian.sh run DIRECTORY COMMAND [ARG ...]    as the user `newcomer`, in that user's home
#
# As root, with mmdebstrap. The user has 1,024 descriptors and none of this machine's environment. What a machine needs to
# reach its package registries goes along: its certificates, its resolver and pip's configuration.
# A command sees this machine's kernel, devices and network, and only the processes that it starts; they end with it.
set -eu
user=newcomer
descriptors=1024

usage() {
  sed -n 's/^#   //p' "$0" >&2
  exit 2
}

# Ends unless a PROGRAM is there, of a PACKAGE.
need() {
  command -v "$1" > /dev/null && return
  echo "bare_debian.sh: $1 is not installed: apt-get install $2" >&2
  exit 1
}

[ $# -ge 2 ] || usage
what=$1 root=$2
shift 2
case $what in
  make)
    need mmdebstrap mmdebstrap
    packages=$(IFS=, && echo "python3,ca-certificates${*:+,$*}")
    mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Retries "4"' --include="$packages" "${SUITE:-trixie}" "$root"
    for file in /etc/ssl/certs/ca-certificates.crt /etc/resolv.conf /etc/hosts /etc/pip.conf; do
      if [ -e "$file" ]; then cp --dereference "$file" "$root$file"; fi
    done
    chroot "$root" useradd --create-home --user-group --shell /bin/sh "$user"
    ;;
  run)
    [ $# -ge 1 ] || usage
    need unshare util-linux
    # shellcheck disable=SC2016  # the inner shell expands these
    exec unshare --mount --pid --fork --kill-child --propagation private sh -euc '
      root=$1 user=$2 descriptors=$3
      shift 3
      mount --rbind /dev "$root/dev"
      mount --rbind /sys "$root/sys"
      mount -t proc proc "$root/proc"
      exec chroot "$root" setpriv --reuid="$user" --regid="$user" --init-groups --reset-env \
        prlimit --nofile="$descriptors:" -- sh -c '\''cd && exec "$@"'\'' sh "$@"' sh "$root" "$user" "$descriptors" "$@"
    ;;
  *) usage ;;
esac
