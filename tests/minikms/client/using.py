"""One call for each of the clients: the same tests run with the blocking one, with asyncio and with uvloop.

Owns the answers and calls that many tests use.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import uvloop

from minikms.api import errors
from minikms.client import AsyncClient, Client
from tests.minikms.client.hostile import answer

KEY = "k_" + "0" * 26
CREATED = answer(b'{"key_id":"%b","wrapped":"eA=="}' % KEY.encode())
SEALED = answer(b'{"ciphertext":"eA=="}')
STATUS = answer(b'{"a":1}')
WAIT_S = 60.0

Use = Callable[..., list[Any]]


PAUSE_S = 0.02


def pause() -> None:
    """Between two calls, where nothing depends on what the far side does meanwhile. Otherwise a test gives its own."""
    time.sleep(PAUSE_S)


def use_blocking(
    path: str, *calls: tuple[str, dict[str, Any]], between: Callable[[], object] = pause, **options: Any
) -> list[Any]:
    """Makes the calls one after the other with one client; a KmsError is a result. `between`: waits after each."""
    with Client(path, **options) as client:
        results = []
        for name, arguments in calls:
            try:
                results.append(getattr(client, name)(**arguments))
            except errors.KmsError as error:
                results.append(error)
            between()
        return results


def use_asyncio(
    path: str,
    *calls: tuple[str, dict[str, Any]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    between: Callable[[], object] = pause,
    **options: Any,
) -> list[Any]:
    async def main() -> list[Any]:
        async with AsyncClient(path, **options) as client:
            results = []
            for name, arguments in calls:
                try:
                    results.append(await getattr(client, name)(**arguments))
                except errors.KmsError as error:
                    results.append(error)
                await asyncio.to_thread(between)
            return results

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())


def use_uvloop(path: str, *calls: tuple[str, dict[str, Any]], **options: Any) -> list[Any]:
    return use_asyncio(path, *calls, loop_factory=uvloop.new_event_loop, **options)


STATUS_CALL: tuple[str, dict[str, Any]] = ("status", {})
CREATE_CALL = ("create_dek_for_thread", {"thread_id": "t"})
ENCRYPT_CALL = ("encrypt", {"key_id": KEY, "plaintext": b"x"})
