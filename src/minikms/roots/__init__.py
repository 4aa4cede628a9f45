"""Root key providers: where the 32 bytes of the root key come from.

Owns: the providers and their names as text (`roots.providers`), the format of a key file (`roots.key_file`), new shares
of a root key (`roots.recovery_shares`), shares that people type (`roots.typed_shares`), and the pin file (`roots.pin`).
Invariants: key text never becomes a Python object; a missing root key is an error, never a new random key, except for a
development key of a new data directory. The room must never keep a root key: the caller releases its
slot of the arena.
"""
