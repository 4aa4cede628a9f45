"""Keys and their rules: ids, states, DEK records, the keyring, tables of opened and known keys, collected shares.

Owns: what a key is, and which state changes are legal. Invariants: no I/O, no clock and no randomness of its own:
bytes, times and nonces are passed in. It must never hold key material outside the arena.
"""
