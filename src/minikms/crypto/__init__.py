"""Cryptography of miniKMS: AES-256-GCM under labelled associated data, wrapping of keys, envelopes of records.

Owns: labels, the length-prefixed AAD encoding, sealing and opening. Invariants: keys come and go as views of the secret
arena, never as `bytes`; a cipher object lives for one call; a nonce is random and used once. It must never do I/O, read
a clock, or say why something did not open.
"""
