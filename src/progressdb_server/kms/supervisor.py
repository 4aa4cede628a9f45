"""The supervisor: there is a miniKMS at the socket, and if there isn't, it starts one.

Owns: the decision between using the daemon that answers and spawning one, its restarts, and its end. Rules:

1. A daemon that answers `/health` at the socket, served by an expected uid, is used. Nothing is spawned beside a live
   socket.
2. Otherwise one is spawned there (unless `spawn` is false), also when the used one dies later. When two servers do so
   at once, the lock on miniKMS's data directory decides; the loser's child ends, and by rule 1 the loser uses the
   winner's.
3. A spawned daemon that dies is started again after a pause that grows from `PAUSE_S_MIN` to `PAUSE_S_MAX` and is
   spread by chance; one that lived for `STABLE_S` starts the count anew. A first start that fails is the caller's to
   know: `start` raises.
4. What was spawned here ends with this server. What was found is left alone.
5. Each that is spawned is told which line its audit log must have, as this server remembers it just then.

It holds no key; it passes on the path of the key file or the descriptor of `masterkey`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec
import structlog

from minikms.client import AsyncClient, KmsError
from minikms.client.errors import KmsUnavailableError, KmsUntrustedServerError
from progressdb_server.kms.child import Child, ChildOptions

READY_S_MAX: Final = 30.0
FOUND_S_MAX: Final = 2.0
"""After a spawned daemon ended before it answered: how long another server's may take to answer instead."""
ABSENT_S_MAX: Final = 10.0
"""Where none is spawned: how long a miniKMS that is started by others may take."""
HEALTH_TIMEOUT_S: Final = 2.0
READY_POLL_S: Final = 0.03
WATCH_POLL_S: Final = 0.5
PAUSE_S_MIN: Final = 0.1
PAUSE_S_MAX: Final = 10.0
STABLE_S: Final = 30.0


class SupervisorError(Exception):
    """No miniKMS could be had at the start; the text says why and what to do."""


class Supervisor:
    """Keeps a miniKMS at `options.socket_path` from `start` to `stop`. Belongs to one event loop."""

    def __init__(
        self,
        options: ChildOptions,
        *,
        spawn: bool = True,
        server_uids: Collection[int] | None = None,
        audit_head: Callable[[], str] = str,
    ) -> None:
        """audit_head: asked before each start, in the event loop; see `ChildOptions.command`."""
        self._options = options
        self._spawn = spawn
        self._audit_head = audit_head
        self._health = AsyncClient(options.socket_path, server_uids=server_uids, timeout_s=HEALTH_TIMEOUT_S, wait_s=0.0)
        self._log = structlog.get_logger("progressdb.kms").bind(socket=options.socket_path)
        self._task: asyncio.Task[None] | None = None
        self._child: Child | None = None
        self._reason = ""
        self._failures = 0

    @property
    def child_pid(self) -> int | None:
        """The pid of the daemon that was spawned here, while it lives."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Returns once a miniKMS answers. Raises SupervisorError when none can be had; nothing is left running then."""
        try:
            found = await self._have_one(FOUND_S_MAX)
        except BaseException:
            await self.stop()
            raise
        if not found:
            await self.stop()
            raise SupervisorError(f"no miniKMS at {self._options.socket_path}: {self._reason}")
        self._task = asyncio.get_running_loop().create_task(self._keep(), name="minikms supervisor")

    async def stop(self) -> None:
        """Ends what was spawned here, gracefully, and waits for it. May be repeated."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        child, self._child = self._child, None
        if child is not None:
            await child.stop()
            self._log.info("miniKMS stopped", pid=child.pid)
        await self._health.close()

    async def _have_one(self, found_s_max: float) -> bool:
        """One try: true once a daemon answers, spawned here or found; false with `_reason` set."""
        error = await self._ask()
        if error is None:
            self._log.info("using the miniKMS that answers")
            return True
        if isinstance(error, KmsUntrustedServerError):
            self._reason = str(error)
            return False
        if not self._spawn or not isinstance(error, KmsUnavailableError):  # absent, or there and silent
            self._log.info("waiting for miniKMS to answer")
            self._reason = f"{error}; start it, or let this server spawn one (unset PROGRESSDB_KMS_SPAWN)"
            return await self._await_answer(None, ABSENT_S_MAX)
        return await self._spawn_one(found_s_max)

    async def _spawn_one(self, found_s_max: float) -> bool:
        try:
            self._make_socket_directory()
            child = self._child = await Child.start(self._options, self._forward, audit_head=self._audit_head())
        except OSError as error:
            self._reason = f"miniKMS can't be started: {error.strerror}"
            return False
        self._log.info("miniKMS spawned", pid=child.pid)
        if await self._await_answer(child, READY_S_MAX):
            return True
        await child.stop()
        self._child = None
        if await self._await_answer(None, found_s_max):
            self._log.info("using the miniKMS of another server")
            return True
        said = " / ".join(child.last_lines) or "nothing"
        self._reason = f"the one that was spawned did not come up, and said: {said}"
        return False

    def _make_socket_directory(self) -> None:
        """The socket's default place is inside the server's data directory, which may be new."""
        os.makedirs(os.path.dirname(os.path.abspath(self._options.socket_path)), mode=0o700, exist_ok=True)

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since_s = loop.time()
            if self._child is None:
                await self._watch_found()
            else:
                status = await self._child.wait()
                self._log.error("miniKMS died", pid=self._child.pid, status=status)
                self._child = None
            if loop.time() - since_s >= STABLE_S:
                self._failures = 0
            while not await self._again():
                self._log.error("no miniKMS", reason=self._reason)

    async def _again(self) -> bool:
        if self._failures:
            await asyncio.sleep(self._pause_s())
        self._failures += 1
        try:
            return await self._have_one(0.0)  # one that is found late, the next try finds
        except Exception as error:  # noqa: BLE001 - a supervisor that ends takes the service with it; logged whole
            self._log.exception("the supervisor failed")  # and goes on: nobody else would restart miniKMS
            self._reason = type(error).__name__
            return False

    def _pause_s(self) -> float:
        longest = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(self._failures, 16))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads servers, protects nothing

    async def _watch_found(self) -> None:
        """Returns once the daemon that was found is gone. One that hangs is not: that is only said."""
        while True:
            await asyncio.sleep(WATCH_POLL_S)
            error = await self._ask()
            if isinstance(error, KmsUnavailableError):
                error = await self._ask()  # a kept connection may have been closed for its idleness
            if isinstance(error, (KmsUnavailableError, KmsUntrustedServerError)):
                self._log.error("the miniKMS that was used is gone", reason=str(error))
                return
            if error is not None:
                self._log.warning("miniKMS does not answer well", reason=str(error))

    async def _ask(self) -> KmsError | None:
        """Asks for its health; why there was no good answer, or None."""
        try:
            await self._health.health()
        except KmsError as error:
            return error
        return None

    async def _await_answer(self, child: Child | None, wait_s_max: float) -> bool:
        """Asks until a daemon answers, `child` ends, or the time is over."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_s_max
        ended = None if child is None else loop.create_task(child.wait())
        try:
            while loop.time() < until_s and (ended is None or not ended.done()):
                if await self._ask() is None:
                    return True
                await asyncio.sleep(READY_POLL_S)
        finally:
            if ended is not None:
                ended.cancel()
        return False

    def _forward(self, line: str) -> None:
        """A line of miniKMS's log becomes a line of this one: its own event where it is one, else its text."""
        try:
            event = msgspec.json.decode(line, type=dict[str, Any])
            name, level = str(event.pop("event")), logging.getLevelNamesMapping()[str(event.pop("level")).upper()]
        except (msgspec.DecodeError, msgspec.ValidationError, KeyError):
            self._log.info("miniKMS", line=line)
            return
        event.pop("timestamp", None)
        self._log.log(level, name, program="minikms", **{f"minikms_{key}": value for key, value in event.items()})
