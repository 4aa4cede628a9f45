"""The file of tombstones of a data directory."""

from pathlib import Path

from minikms.custody.tombstone_file import NAME
from tests.harness.vaults import OpenedVault


def tombstone_path(one: OpenedVault) -> Path:
    return one.directory / NAME
