"""The server without encryption: what encryption costs is measured against it (`python -m bench append_added`).

Owns: the provider that seals nothing, and when a server may run with it. This is the one exception to "nothing that a
user typed is stored in plaintext". Invariants:
- It is asked for twice, in words: `--kms none` on the command line, and VARIABLE in the environment. Neither does
  anything alone, and no configuration file can say either.
- It listens on a loopback address only, and never beside any setting of a key service.
- It begins in an empty directory only. The store that it makes there is marked (store/form.py), and so is each record:
  a server that encrypts refuses that store, no key service opens such a record, and this opens no other. It binds none
  to its place.
It must never be imported but by server.py, and there only once it was asked for.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from typing import Final

from minikms import api
from progressdb_server.config import Config, ConfigError, Kms
from progressdb_server.kms.provider import KeyHandle, Open, ProviderRefusedError, Seal
from progressdb_server.store import form
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.rocks import RocksReader

VARIABLE: Final = "PROGRESSDB_BENCHMARK"
VALUE: Final = "store-everything-in-plaintext"
MARK: Final = b"plaintext, benchmarks only: "
"""What each record has in the place of nonce and tag, and as long (store/sealer.py counts). Nothing opens under it."""
KEY_ID: Final = "k_none_nothing_is_encrypted"
"""Of every thread. No key service has made it."""


def check_allowed(config: Config, environment: Mapping[str, str], *, has_master_key: bool) -> None:
    """Unless all says that this is a benchmark: raises ConfigError. Makes nothing."""
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
    """Of an address in digits: what a name stands for is decided elsewhere."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _check_directory(config: Config) -> None:
    directory = config.storage.db_path
    try:
        if not os.path.lexists(directory) or not os.listdir(directory):
            return
        reader = RocksReader(str(config.store_dir))
    except OSError as error:
        raise ConfigError(f"the directory {directory} can't be read: {error.strerror}") from None
    except EngineUnavailableError:
        raise ConfigError(
            f"`--kms none` stores everything in plaintext, and {directory} is neither empty nor of an earlier "
            "benchmark: give --db a new directory"
        ) from None
    try:
        form.check(reader, encrypted=False)
    except form.FormatError as error:
        raise ConfigError(str(error)) from None
    finally:
        reader.close()


class UnencryptedProvider:
    """See `kms.provider.Provider`. A record is MARK and the plaintext."""

    encrypts: Final = False

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str = ""
    ) -> KeyHandle:
        if replaces is not None:
            raise _no_keys()
        return KeyHandle(KEY_ID, b"")

    async def encrypt_with_key(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        return MARK + plaintext

    async def decrypt_with_key(
        self, key_id: str, ciphertext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        outcome = _opened(ciphertext)
        if isinstance(outcome, ProviderRefusedError):
            raise outcome
        return outcome

    async def encrypt_many(self, items: Sequence[Seal]) -> list[bytes | ProviderRefusedError]:
        return [MARK + item.plaintext for item in items]

    async def decrypt_many(self, items: Sequence[Open]) -> list[bytes | ProviderRefusedError]:
        return [_opened(item.ciphertext) for item in items]

    async def retire(self, key_id: str, *, request_id: str = "") -> None:
        return None

    async def reencrypt_many(
        self, from_key_id: str, to_key_id: str, items: Sequence[tuple[bytes, bytes]], *, request_id: str = ""
    ) -> list[bytes | ProviderRefusedError]:
        raise _no_keys()

    async def check_many(
        self, key_id: str, items: Sequence[tuple[bytes, bytes]], *, thread_id: str, request_id: str = ""
    ) -> list[ProviderRefusedError | None]:
        outcomes = [_opened(record) for record, _ in items]
        return [outcome if isinstance(outcome, ProviderRefusedError) else None for outcome in outcomes]

    async def list_keys(
        self, *, thread_id: str | None = None, state: api.State | None = None, cursor: str | None = None
    ) -> api.KeyListAnswer:
        return api.KeyListAnswer([])

    async def destroy(self, key_id: str, *, request_id: str = "") -> None:
        raise _no_keys()

    async def status(self) -> dict[str, object]:
        raise _no_keys()

    async def close(self) -> None:
        return None


def _opened(record: bytes) -> bytes | ProviderRefusedError:
    if not record.startswith(MARK):
        return ProviderRefusedError("the record is not one of a server without encryption", api.CODE_DECRYPTION_FAILED)
    return record[len(MARK) :]


def _no_keys() -> ProviderRefusedError:
    return ProviderRefusedError("this server encrypts nothing and has no keys", api.CODE_NOT_FOUND)
