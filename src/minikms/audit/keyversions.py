"""The audit key versions of an unlocked keyring, as the log takes them.

Owns: which version is current, and which the log may still end under. It must never copy a key: it hands out views.
"""

from __future__ import annotations

from minikms.audit.opening import Keys
from minikms.audit.record import Head
from minikms.audit.signer import AuditKey, LocalSigner
from minikms.keys import keyring
from minikms.keys.unlocked import UnlockedKeyring


def keys_of(unlocked: UnlockedKeyring) -> Keys:
    """The newest version and those before it: a change of key reaches the keyring first, and the log's end later."""
    *earlier, current = (_audit_key(unlocked, key) for key in unlocked.body.audit_keys)
    return Keys(current=current, former=tuple(earlier))


def since(key: keyring.AuditKey) -> Head | None:
    """The log's last line under the version before `key`, as the keyring remembers it; None of the first version."""
    return Head(key.since_seq, key.since_sig) if key.since_seq else None


def _audit_key(unlocked: UnlockedKeyring, key: keyring.AuditKey) -> AuditKey:
    mac_key, seed = unlocked.audit_key(key.version)
    return AuditKey(key.version, mac_key, LocalSigner(seed), since(key))
