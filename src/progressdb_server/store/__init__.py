"""Threads and messages on disk, each sealed under its thread's key. Other rooms use `store.model`.

Owns: the engine seam, the key space, the record format, the sealing of records, checks and backups. Invariants: nothing
that a user typed is on disk in plaintext; what an operation has answered survives power loss; one writer commits.
"""
