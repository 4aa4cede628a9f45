"""Where raw keys live, and what keeps other processes away from them.

Owns: the secret arena, the hardening of the process, and signals as file descriptors. Invariants: nothing here knows
what a key is for; every measure says whether it is in force, and why not. It must never import another room than the
error tree.
"""

from minikms.memory.arena import (
    SLOT_BYTES,
    SecretArena,
    SecretSlot,
    fill_random,
    hex_decode_into,
    read_key_fd_into,
    zero,
)
from minikms.memory.process import Measure, harden, interpreter_paths
from minikms.memory.signals import SignalReader, unblock_signals

__all__ = [
    "SLOT_BYTES",
    "Measure",
    "SecretArena",
    "SecretSlot",
    "SignalReader",
    "fill_random",
    "harden",
    "hex_decode_into",
    "interpreter_paths",
    "read_key_fd_into",
    "unblock_signals",
    "zero",
]
