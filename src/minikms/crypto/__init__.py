"""Cryptography of miniKMS: XAES-256-GCM with labelled associated data, derivations from a root key, streams, shares.

Owns: labels, the encoding of associated data, sealing and opening, shares of a root key. Invariants: a key is a view of
the secret arena, never `bytes`; a cipher object lives for one call, or until the end of the event loop's turn
(`records`); a nonce is random and used once, and in a stream its chunk's number. It must never do I/O, read a clock, or
say why something did not open.
"""
