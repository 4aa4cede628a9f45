"""Data directories with tombstones: in the former format, and with a damaged file. It asserts nothing."""

from __future__ import annotations

from pathlib import Path

from minikms.custody.tombstone_file import NAME, read_tombstones
from minikms.keys import keyring
from minikms.keys.dek import bytes_to_key_id
from tests.harness.vaults import OpenedVault
from tests.minikms.keys import keyrings

AT = "2026-11-24T15:00:00Z"


def tombstone_path(one: OpenedVault) -> Path:
    return one.directory / NAME


def to_format_1(one: OpenedVault, *, without: str = "") -> None:
    """Writes the keyring as an earlier version of the program would: tombstones inside, and no file of them. `without`:
    a destroyed key that it does not know yet; then the file stays."""
    vault = one.vault
    path = tombstone_path(one)
    content = path.read_bytes() if path.exists() else None
    read = read_tombstones(content, vault.keyring.body, vault.unlocked.tombstone_key)
    stones = tuple(keyring.Tombstone(bytes_to_key_id(key), AT) for key, _ in read.stones())
    stones = tuple(stone for stone in stones if stone.key_id != without)
    if not without:
        path.unlink(missing_ok=True)
    root = bytes.fromhex(one.key.read_text())
    (one.directory / "keyring.json").write_bytes(keyrings.in_former_format(vault.unlocked, root, 1, stones))
