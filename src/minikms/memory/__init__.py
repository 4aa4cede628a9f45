"""The memory that holds raw keys, and the hardening that keeps other processes away from it.

Owns: the secret arena, the hardening of the process, secrets that a person types, and reading signals from a file
descriptor. Invariants: nothing here knows the purpose of a key; every measure reports whether it is in force, and if
not, why. It must never import another room than the error tree.
"""

from minikms.memory.arena import (
    SLOT_BYTES,
    SecretArena,
    SecretSlot,
    fill_random,
    hex_decode_into,
    hex_encode_into,
    read_key_fd_into,
    zero,
    zero_bytes,
)
from minikms.memory.process import NETWORK_PATHS, Measure, harden, interpreter_paths
from minikms.memory.signals import SignalReader, unblock_signals

__all__ = [
    "NETWORK_PATHS",
    "SLOT_BYTES",
    "Measure",
    "SecretArena",
    "SecretSlot",
    "SignalReader",
    "fill_random",
    "harden",
    "hex_decode_into",
    "hex_encode_into",
    "interpreter_paths",
    "read_key_fd_into",
    "unblock_signals",
    "zero",
    "zero_bytes",
]
