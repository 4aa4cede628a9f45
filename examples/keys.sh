#!/bin/sh
# miniKMS alone: `sh examples/keys.sh` runs each line that it shows, on a daemon and a directory of its own. It needs
# `minikms` on the PATH, and uses no configuration of the user. A line with an unexpected outcome ends it with status 1.
set -u
place=$(mktemp -d) && cd "$place" || exit 1
for name in $(env | sed -n 's/^\(PROGRESSDB_[A-Z_]*\)=.*/\1/p'); do unset "$name"; done
export PROGRESSDB_KMS_SOCKET=kms.sock PROGRESSDB_KMS_DATA_DIR=keys PROGRESSDB_MINIKMS_MASTER_KEY_FILE=root.key
daemon=
trap 'test -z "$daemon" || { kill "$daemon"; wait "$daemon"; }; rm -rf "$place"' EXIT
trap 'exit 130' INT TERM

say() { printf '\n# %s\n' "$1"; }
run() { # a line, and the exit status that it must have
    printf '$ %s\n' "$1"
    eval "$1" 2>&1
    status=$?
    test "$status" -eq "${2:-0}" || { echo "that ended with exit status $status, ${2:-0} was expected"; exit 1; }
}

say 'Make a data directory, and a root key to lock it with'
run 'minikms init --data-dir keys --master-key-file root.key'
say 'Serve it on a Unix socket, to this user only'
printf '$ minikms --socket kms.sock --data-dir keys --master-key-file root.key 2> log &\n'
minikms --socket kms.sock --data-dir keys --master-key-file root.key 2> log &
daemon=$!
until test -S kms.sock; do kill -0 "$daemon" 2> /dev/null || { cat log; exit 1; }; sleep 0.05; done
run 'minikms status'
say 'Encrypt a file. Its key is made, wrapped and kept by the daemon'
run "echo 'the door code is 4711' > note"
run 'minikms encrypt note'
run "grep -c 'door code' note.kms" 1
run 'minikms decrypt note.kms --output -'
say 'Rotate the key-encryption key while it serves; what was encrypted stays readable'
run 'minikms rotate-kek --yes'
run 'minikms decrypt note.kms --output -'
say 'Back up what is needed to decrypt, without the root key'
run 'minikms backup create monday.backup'
say 'Every use of a key is in the audit log, each line chained to the one before it'
run 'minikms audit tail --lines 4'
run 'minikms audit verify'
say 'An altered file does not open'
run 'printf alter | dd of=note.kms bs=1 seek=115 conv=notrunc status=none'
run 'minikms decrypt note.kms --output -' 1
printf '\nAll went as it should. `minikms --help` lists what else there is.\n'
