"""The server without encryption, against which the cost of encryption is measured (`python -m bench append_added`).

Owns: the provider that seals nothing, and when a server may run with it. This is the one exception to "nothing that a
user typed is stored in plaintext". Invariants:
- It is requested twice, in words: `--kms none` on the command line, and VARIABLE in the environment. Neither does
  anything alone, and no configuration file can set either.
- It listens on a loopback address only, and never beside any setting of a key service.
- It begins only in an empty directory. The store that it makes there is marked (store/directory.py), and so is each
  record: a server that encrypts refuses that store, no key service opens such a record, and this server opens no other.
  Records are not bound to their places.
Only server.py may import it, and only once it was requested.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from typing import Final

from minikms import api
from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from progressdb_server.config import Config, ConfigError, Kms
from progressdb_server.kms.provider import EncryptsNothing
from progressdb_server.store import directory
from progressdb_server.store.model import FormatError, StoreUnavailableError

VARIABLE: Final = "PROGRESSDB_BENCHMARK"
VALUE: Final = "store-everything-in-plaintext"
MARK: Final = b"plaintext, for benchmarks of this only: "
"""In the place of each record's nonce and tag, and as long, which store/sealer.py checks. No key opens such a
record."""
KEY_ID: Final = "k_none_nothing_is_encrypted"
"""The key id of every thread. No key service has made it."""


def check_allowed(config: Config, environment: Mapping[str, str], *, has_master_key: bool) -> None:
    """Raises ConfigError unless everything says that this is a benchmark. Makes nothing."""
    if environment.get(VARIABLE) != VALUE:
        raise ConfigError(
            "`--kms none` stores everything in plaintext and is for benchmarks only: leave it out; for a benchmark "
            f"set {VARIABLE}={VALUE} beside it"
        )
    if has_master_key or config.kms != Kms():
        raise ConfigError(
            "`--kms none` stores everything in plaintext, but a key service or a root key is configured: leave the "
            "flag out, or for a benchmark every setting of kms and the root key"
        )
    if not _is_loopback(config.server.address):
        raise ConfigError(
            "`--kms none` stores everything in plaintext and serves this machine only: leave it out, or for a "
            f"benchmark listen on 127.0.0.1 instead of {config.server.address}"
        )
    _check_directory(config)


def _is_loopback(address: str) -> bool:
    """Only for an address in digits: what a name resolves to is decided elsewhere."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _check_directory(config: Config) -> None:
    path = config.storage.db_path
    try:
        if not os.path.lexists(path) or not os.listdir(path):
            return
        with directory.open_reader(str(config.store_dir), encrypted=False):
            pass
    except OSError as error:
        raise ConfigError(f"the directory {path} can't be read: {error.strerror}") from None
    except StoreUnavailableError:
        raise ConfigError(
            f"`--kms none` stores everything in plaintext, and {path} is neither empty nor of an earlier "
            "benchmark: give --db a new directory"
        ) from None
    except FormatError as error:
        raise ConfigError(str(error)) from None


class UnencryptedProvider(EncryptsNothing):
    """See `kms.provider.Provider`. A record is MARK and the plaintext."""

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer:
        if replaces is not None:
            raise _no_keys()
        return api.CreateDekAnswer(KEY_ID, b"")

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> bytes:
        return MARK + plaintext

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]:
        return [MARK + item.plaintext for item in items]

    async def decrypt_batch(
        self, items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        return [_opened(item.ciphertext) for item in items]

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        raise _no_keys()

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None = None
    ) -> list[KmsRefusedError | None]:
        outcomes = [_opened(item.ciphertext) for item in items]
        return [outcome if isinstance(outcome, KmsRefusedError) else None for outcome in outcomes]

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        raise _no_keys()

    async def list_keys(
        self, *, thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
    ) -> api.KeyListAnswer:
        return api.KeyListAnswer([])

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer:
        raise _no_keys()

    async def status(self) -> api.StatusAnswer:
        raise _no_keys()

    async def close(self) -> None:
        return None


def _opened(record: bytes) -> bytes | KmsRefusedError:
    if not record.startswith(MARK):
        return refusal(api.CODE_DECRYPTION_FAILED, "the record is not one of a server without encryption")
    return record[len(MARK) :]


def _no_keys() -> KmsRefusedError:
    return refusal(api.CODE_NOT_FOUND, "this server encrypts nothing and has no keys")
