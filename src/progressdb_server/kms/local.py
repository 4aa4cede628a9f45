"""The provider for development: the key service in this very process, without a daemon.

The files are those of a daemon, so the data can be given to one later. But the keys are in the server's memory, and
the server can do everything that miniKMS can: it must never be used where the data is real.
"""

from __future__ import annotations

import os
from typing import Self

from minikms.embedded import EmbeddedClient, EmbeddedError
from progressdb_server.kms.bridge import ClientProvider


class LocalProviderError(Exception):
    """The key service can't be opened here; the text says why and what to do."""


class LocalProvider(ClientProvider):
    """Made by `LocalProvider.open`."""

    @classmethod
    async def open(
        cls, data_dir: str | os.PathLike[str], *, master_key_file: str | os.PathLike[str] | None = None
    ) -> Self:
        """Opens or makes the data directory; without a key file, with one made beside it. Raises LocalProviderError."""
        try:
            return cls(await EmbeddedClient.open(data_dir, master_key_file=master_key_file))
        except EmbeddedError as error:
            raise LocalProviderError(str(error)) from None
