"""The keys: create, read, list, rotate and config.

Owns: what an answer says of a key, and which settings are offered. Invariants: a version is made only as the successor
of the newest one, which the key service checks, so two rotations at once make two versions with two numbers; nothing is
destroyed here.
"""

from __future__ import annotations

from typing import Any, Final

from minikms import api
from minikms.api.errors import ConflictError, KeyNotFoundError
from minikms_gateway.transit.keyring import THREAD_PREFIX, VERSIONS_MAX, TransitCaller, TransitKey
from minikms_gateway.transit.wire import Number, Short, TransitBody, VaultError, envelope

TYPE: Final = "aes256-gcm96"
"""What clients call a key that encrypts; the records are XAES-256-GCM."""
MAC_TYPE: Final = "hmac"
ROTATE_ATTEMPTS_MAX: Final = 5
"""The attempts for one rotation, while others win."""
NO_DESTRUCTION: Final = (
    "no key is destroyed through the gateway: retire and destroy it at the key service, with `minikms keys`"
)
_NO_PERIODS: Final = frozenset({"", "0", "0s", "0m", "0h"})


class KeySettings(TransitBody):
    """The settings of a new key, or of `config`."""

    type: Short | None = None
    key_size: Number | None = None
    derived: bool | None = None
    convergent_encryption: bool | None = None
    exportable: bool | None = None
    allow_plaintext_backup: bool | None = None
    deletion_allowed: bool | None = None
    auto_rotate_period: Short | Number | None = None
    min_decryption_version: Number | None = None
    min_encryption_version: Number | None = None

    def check(self) -> None:
        """Refuses what no key here has. Raises VaultError."""
        if self.type not in (None, TYPE, MAC_TYPE):
            raise VaultError(f"unknown key type: this service makes keys of the types {TYPE} and {MAC_TYPE} only")
        if self.type == MAC_TYPE and self.derived:
            raise VaultError(f"key derivation is not supported for keys of the type {MAC_TYPE}")
        if self.key_size not in (None, 0, api.MAC_BYTES):
            raise VaultError(f"key_size is not offered: keys have {api.MAC_BYTES} bytes")
        for name in ("convergent_encryption", "exportable", "allow_plaintext_backup"):
            if getattr(self, name):
                raise VaultError(f"{name} is not offered")
        if str(self.auto_rotate_period or "") not in _NO_PERIODS:
            raise VaultError("auto_rotate_period is not offered: rotate the key by a timer of your own")
        if self.deletion_allowed:
            raise VaultError(NO_DESTRUCTION, 403)


async def create(caller: TransitCaller, name: str, settings: KeySettings) -> bytes:
    """A key that exists stays as it is."""
    settings.check()
    key = await caller.lookup(name)
    if key is None:
        fields = {
            "thread_id": THREAD_PREFIX + name,
            "purpose": "mac" if settings.type == MAC_TYPE else "derived" if settings.derived else "data",
            "numbered": True,
        }
        try:
            await caller.native(api.CREATE_DEK, api.CreateDekAnswer, body=fields)
        except ConflictError:  # somebody else has just made it
            pass
        else:
            return _shown(await caller.found(name))
        key = await caller.found(name)
    return _shown(key, warning=f"key {name} already existed")


async def read(caller: TransitCaller, name: str, _body: TransitBody) -> bytes:
    key = await caller.lookup(name)
    if key is None:
        raise VaultError("", 404)
    return _shown(key)


async def list_names(caller: TransitCaller, _name: str, _body: TransitBody) -> bytes:
    names = await caller.names()
    if not names:
        raise VaultError("", 404)
    return envelope({"keys": names})


async def rotate(caller: TransitCaller, name: str, _body: TransitBody) -> bytes:
    """Makes the next version, and retires the one before."""
    for _ in range(ROTATE_ATTEMPTS_MAX):
        key = await caller.lookup(name)
        if key is None:
            raise VaultError("key not found")
        if len(key.versions) >= VERSIONS_MAX:
            raise VaultError(f"a key has at most {VERSIONS_MAX} versions: destroy old ones at the key service")
        fields = {
            "thread_id": THREAD_PREFIX + name,
            "replaces": key.latest_id,
            "purpose": key.purpose,
            "numbered": True,
        }
        try:
            await caller.native(api.CREATE_DEK, api.CreateDekAnswer, body=fields)
        except (ConflictError, KeyNotFoundError):  # another rotation came first
            continue
        return _shown(await caller.found(name))
    raise VaultError("other rotations of this key came first: try again", 503)


async def configure(caller: TransitCaller, name: str, settings: KeySettings) -> bytes:
    """Accepts what a key has anyway."""
    settings.check()
    key = await caller.lookup(name)
    if key is None:
        raise VaultError("no existing key of this name could be found")
    lowest = settings.min_decryption_version or 0
    if lowest < 0 or (settings.min_encryption_version or 0) < 0:
        raise VaultError("min decryption and encryption version cannot be negative")
    if max(lowest, settings.min_encryption_version or 0) > key.latest:
        raise VaultError(f"cannot set a min version above the latest key version, {key.latest}")
    if lowest > min(key.versions):
        raise VaultError(
            "min_decryption_version is not offered: rewrap, then destroy the old versions at the key service"
        )
    if settings.min_encryption_version not in (None, 0, key.latest):
        raise VaultError("min_encryption_version is not offered: only the latest version encrypts")
    return _shown(key)


async def refuse_destruction(_caller: TransitCaller, _name: str, _body: TransitBody) -> bytes:
    raise VaultError(NO_DESTRUCTION, 403)


def _shown(key: TransitKey, *, warning: str = "") -> bytes:
    lowest, seals = min(key.versions), key.purpose != "mac"
    data: dict[str, Any] = {
        "name": key.name,
        "type": TYPE if seals else MAC_TYPE,
        "derived": key.purpose == "derived",
        "exportable": False,
        "allow_plaintext_backup": False,
        "deletion_allowed": False,
        "latest_version": key.latest,
        "min_available_version": lowest if lowest > 1 else 0,
        "min_decryption_version": lowest,
        "min_encryption_version": 0,
        "supports_encryption": seals,
        "supports_decryption": seals,
        "supports_signing": False,
        "supports_derivation": seals,
        "auto_rotate_period": 0,
        "imported_key": False,
        "soft_deleted": False,
        "keys": {str(number): version.created for number, version in sorted(key.versions.items())},
    }
    return envelope(data, warning=warning)
