"""Backup archives of a data directory: format, register, creation, restore.

Owns: everything about an archive that `minikms backup` makes. Invariants: an archive is verified before it is called
complete; a restore never overwrites a data directory that holds keys. The room must never write a key unwrapped.
"""
