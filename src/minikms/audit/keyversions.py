"""The audit key versions of an unlocked keyring, as the log takes them.

Owns: which version is current, and which the log may still end under. It must never copy a key: it hands out views.
"""

from __future__ import annotations

from minikms.audit.opening import Keys
from minikms.audit.signer import AuditKey, LocalSigner
from minikms.keys.unlocked import UnlockedKeyring


def keys_of(unlocked: UnlockedKeyring) -> Keys:
    """The newest version and those before it: a change of key reaches the keyring first, and the log's end later."""
    *earlier, current = (_audit_key(unlocked, key.version) for key in unlocked.body.audit_keys)
    return Keys(current=current, former=tuple(earlier))


def _audit_key(unlocked: UnlockedKeyring, version: int) -> AuditKey:
    mac_key, seed = unlocked.audit_key(version)
    return AuditKey(version, mac_key, LocalSigner(seed))
