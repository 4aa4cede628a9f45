"""Bounds of requests and answers, the syntax of ids, error codes, and the name of the development key file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
ROOT_BODY_BYTES_MAX: Final = 4096
"""The body of a request to `/unseal` or `/roots`: twice the size of the largest, which names a set of 16 shares."""
HEAD_BYTES_MAX: Final = 16 * 1024
HEADERS_COUNT_MAX: Final = 64
STREAM_LABEL: Final = b"minikms/stream/v1\0"
"""The label of the associated data of a stream, which clients encrypt (docs/spec/stream.md)."""
STREAM_THREAD: Final = "minikms.files"
"""The thread of the key of a stream for which none is chosen."""
BATCH_ITEMS_MAX: Final = 1024
CONNECTIONS_MAX: Final = 2048
PIPELINED_REQUESTS_MAX: Final = 64
PLAINTEXT_BYTES_MAX: Final = 4 * 1024 * 1024
"""The plaintext of one item: four times the message size that the server accepts; its base64 still fits a body."""
AAD_BYTES_MAX: Final = 4096
SEAL_BYTES: Final = 24 + 16
"""Nonce and tag: by how much a ciphertext is longer than its plaintext."""
MAC_BYTES: Final = 32
REQUEST_ID_CHARS_MAX: Final = 128
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7), less its end mark."""
ID_CHARS_MAX: Final = 128
LIST_KEYS_COUNT_DEFAULT: Final = 100
LIST_KEYS_COUNT_MAX: Final = 1000
RANDOM_BYTES_MAX: Final = 4096
VERIFY_SAMPLES_MAX: Final = 64
KEY_HEX_CHARS: Final = 64
"""The length of a root key as text."""
SHARE_BYTES_MAX: Final = 256
"""The text of a share as somebody types it, with spaces and hyphens anywhere."""
SEALED_RETRY_SECONDS: Final = 5
"""`Retry-After` of a refusal because the service is sealed."""
AUDIT_LAGGING_RETRY_SECONDS: Final = 5
"""`Retry-After` of a refusal because the auditor lags: it reports this often."""
FULL_RETRY_SECONDS: Final = 1
"""`Retry-After` of a refusal because there are too many connections, or too much is being received."""
INDEXING_RETRY_SECONDS: Final = 2
"""`Retry-After` of a refusal because key files are still being read after the start."""

THREAD_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
KEY_ID_PATTERN: Final = re.compile(r"k_[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII)
"""`k_` and 128 bits in lower-case Crockford base 32: 48 bits of Unix milliseconds, then 80 random bits (as a ULID)."""
ORIGIN_PATTERN: Final = re.compile(r"[A-Za-z0-9._/:-]{1,128}", re.ASCII)
"""The name of the tree that an auditor makes of the audit log."""
KEYRING_ID_PATTERN: Final = re.compile(r"kr_[0-9a-f]{16}", re.ASCII)
SLOT_ID_PATTERN: Final = re.compile(r"s[0-9]{1,19}", re.ASCII)
"""`s` and the epoch of the keyring in which the slot of a root key was made."""
MEMBER_ID_PATTERN: Final = re.compile(r"m[0-9]{1,19}", re.ASCII)
"""`m` and the number of the slot that came with the host; the first host is number 1."""
MEMBER_NAME_PATTERN: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII)
"""The name of a host of the key service, in the form of host names."""
REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)

REQUEST_ID_HEADER: Final = "x-request-id"
MSGPACK: Final = "application/msgpack"
"""The content type of a batch and its answer in MessagePack (docs/spec/api.md)."""
RESERVED_HEADERS: Final = "x-minikms-"
"""Begins the names of headers that only a proxy sends."""
PRINCIPAL_HEADER: Final = "x-minikms-principal"
"""Names the principal on whose behalf a proxy asks (docs/spec/policy.md)."""

# --- error codes: stable words that a client may switch on; docs/spec/api.md says when each is sent ------------------
CODE_INVALID_REQUEST: Final = "invalid_request"
CODE_UNAUTHORIZED: Final = "unauthorized"
CODE_FORBIDDEN: Final = "forbidden"
CODE_NOT_FOUND: Final = "not_found"
CODE_METHOD_NOT_ALLOWED: Final = "method_not_allowed"
CODE_KEY_NOT_FOUND: Final = "key_not_found"
CODE_KEY_RETIRED: Final = "key_retired"
CODE_KEY_DESTROYED: Final = "key_destroyed"
CODE_KEY_UNREADABLE: Final = "key_unreadable"
CODE_WRONG_THREAD: Final = "wrong_thread"
CODE_WRONG_PURPOSE: Final = "wrong_purpose"
CODE_DECRYPTION_FAILED: Final = "decryption_failed"
CODE_TOO_LARGE: Final = "too_large"
CODE_TOO_MANY: Final = "too_many"
CODE_TIMEOUT: Final = "timeout"
CODE_CONFLICT: Final = "conflict"
CODE_WRONG_SLOT: Final = "wrong_slot"
CODE_LAST_ROOT: Final = "last_root"
CODE_NOT_TESTED: Final = "not_tested"
CODE_NOT_PINNED: Final = "not_pinned"
CODE_INVALID_POLICY: Final = "invalid_policy"
CODE_AUDIT_UNAVAILABLE: Final = "audit_unavailable"
CODE_AUDIT_LAGGING: Final = "audit_lagging"
CODE_STORAGE_UNAVAILABLE: Final = "storage_unavailable"
CODE_SHUTTING_DOWN: Final = "shutting_down"
CODE_INTERRUPTED: Final = "interrupted"
CODE_SEALED: Final = "sealed"
CODE_STANDBY: Final = "standby"
CODE_REPLICA_ROLLED_BACK: Final = "replica_rolled_back"
CODE_REPLICA_FORKED: Final = "replica_forked"
CODE_NOT_SEALED: Final = "not_sealed"
CODE_WRONG_ROOT: Final = "wrong_root"
CODE_TOO_MANY_ATTEMPTS: Final = "too_many_attempts"
CODE_LIMIT_EXCEEDED: Final = "limit_exceeded"
CODE_UNSEAL_FAILED: Final = "unseal_failed"
CODE_WRONG_SHARE: Final = "wrong_share"
CODE_INTERNAL: Final = "internal"


DEVELOPMENT_KEY_SUFFIX: Final = ".master-key"


def development_key_path(data_dir: str | os.PathLike[str]) -> Path:
    """The development key file of a data directory, beside it: a backup of the directory does not hold its root key."""
    return Path(os.path.abspath(data_dir) + DEVELOPMENT_KEY_SUFFIX)
