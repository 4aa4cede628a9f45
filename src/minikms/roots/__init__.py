"""Root key providers: where the 32 bytes of the root key come from.

Owns: reading a root key into the arena from a key file, an inherited descriptor, or a development key file. Invariants:
key text never becomes a Python object; a missing root key is an error, never a new random key. The room must never
keep a root key: the caller releases the slot.
"""
