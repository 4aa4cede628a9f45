"""Keys as ideas: ids, states, the keyring, DEK records, the cache of opened keys.

Owns: what a key is and which moves it may make. Invariants: no I/O, no clock and no randomness of its own (bytes, times
and nonces are passed in); state lives in one transition table. It must never hold key material outside the arena.
"""
