"""Backups of the whole data directory, each in one archive file: format, register, creation, restore.

Owns: the archives that `minikms backup` makes and reads. Invariants: an archive is complete only after it was read back
and verified; a restore never overwrites anything. It must never write an unwrapped key.
"""
