"""The in-process provider with its keys in a file, so that a killed writer's records open in the next process."""

import json
import os

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from tests.progressdb_server.store.sealing_provider import SealingProvider


class KeyFileProvider(SealingProvider):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        if os.path.exists(path):
            with open(path, encoding="ascii") as file:
                for line in file:
                    if line.endswith("\n"):
                        key_id, thread_id, raw = json.loads(line)
                        self.keys[key_id] = (thread_id, AESGCM(bytes.fromhex(raw)))

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer:
        await self._answer("create")
        key_id, raw = "k_" + os.urandom(13).hex(), AESGCM.generate_key(256)
        with open(self._path, "a", encoding="ascii") as file:
            file.write(json.dumps([key_id, thread_id, raw.hex()]) + "\n")
        self.keys[key_id] = (thread_id, AESGCM(raw))
        return api.CreateDekAnswer(key_id, b"wrapped")
