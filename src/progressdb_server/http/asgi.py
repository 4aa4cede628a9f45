"""What an application gets of the HTTP engine: ASGI, and a shorter way beside it.

Owns: the types of ASGI, `DirectChannel`, and the errors that an application can meet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, MutableMapping, Sequence
from typing import Any, Final, Protocol

Header = tuple[bytes, bytes]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

DIRECT: Final = "progressdb.direct"
"""Key of a `DirectChannel` in the ASGI scope. Only this project's own server sets it."""
BODY_REFUSED: Final = "progressdb.body_refused"
"""Type of the ASGI message that comes in the place of a body for which there is no room. Only this project's own server
sends it."""
CLOSE: Final[Header] = (b"connection", b"close")
"""The header of a response with which the connection ends."""


class ClientGoneError(Exception):
    """The client closed its connection before its request was whole, or stopped reading. No response can reach it."""


class ListsFullError(Exception):
    """The list did not get its turn within `limits.LIST_WAIT_SECONDS_MAX`."""


class DirectChannel(Protocol):
    """Reads a body and sends a response without ASGI messages, each of which costs a coroutine and a dictionary.

    No method waits. If one can't finish at once, it does nothing and the caller uses ASGI messages.
    """

    def received_body(self) -> bytes | None:
        """The request's body if all of it was received and none of it was read yet; otherwise None."""
        ...

    def identify(self, payer: Hashable) -> None:
        """Say whose share the body is charged to (`shares`) now that the caller is known: None for no user's."""
        ...

    def send_response(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """Send a complete response with its Content-Length. Returns False if nothing was sent."""
        ...

    def begin_list(self) -> Awaitable[None] | None:
        """Begin the turn in which a list is read and sent (`shares.Lists`). Await the result unless it is None:
        it raises ListsFullError, and ClientGoneError if the client leaves meanwhile."""
        ...

    def end_list(self) -> None: ...
