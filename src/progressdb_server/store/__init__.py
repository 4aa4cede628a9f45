"""Threads and messages on disk, each sealed under its thread's key.

Owns: the engine seam, the key space, the record format, and the operations on threads and messages. Invariants:
nothing a user typed is on disk in plaintext (but in a benchmark's store, marked: progressdb_server/unencrypted.py);
what an operation has answered survives power loss; one writer commits.
"""
