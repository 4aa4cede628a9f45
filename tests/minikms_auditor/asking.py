"""Asking the auditor of a `Rig`: its answers on a socket in this process, and a client as the message server's."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from minikms.api.audit_questions import PATH, AuditAnswer
from minikms.client.connecting import SocketEndpoint
from minikms.client.connection import ClientConnection
from minikms.http import HttpServer
from minikms.http.accepting import Acceptor
from minikms.platform.logs import Log
from minikms.processes.sockets import listen
from minikms_auditor.auditor import Status
from minikms_auditor.config import Config, Questions, parse_config
from minikms_auditor.questions import QUESTION_LIMITS, QuestionApplication
from tests.harness.waiting import WAIT_S_MAX
from tests.minikms_auditor.rig import Rig


class Asked(msgspec.Struct):
    status: int
    body: bytes

    @property
    def answer(self) -> AuditAnswer:
        assert self.status == 200, self
        return msgspec.json.decode(self.body, type=AuditAnswer)


async def ask(path: Path, body: object, target: str = PATH, server_uids: Collection[int] | None = None) -> Asked:
    connection = await ClientConnection.open(SocketEndpoint(path, server_uids), WAIT_S_MAX)
    try:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        answer = await connection.exchange(target.encode(), content, None, WAIT_S_MAX)
        return Asked(answer.status, answer.body)
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def serving(app: QuestionApplication, path: Path) -> AsyncIterator[Path]:
    failed: list[str] = []
    with listen(str(path), {}) as listener:
        server = HttpServer(
            app, loop=asyncio.get_running_loop(), on_internal_error=failed.append, limits=QUESTION_LIMITS
        )
        acceptor = Acceptor(listener.socket, server, on_failure=failed.append)
        yield path
        acceptor.close()
        await server.drain(0)
    app.close()
    assert failed == []


@contextlib.asynccontextmanager
async def desk_of(rig: Rig, *, uids: tuple[int, ...] = (os.getuid(),)) -> AsyncIterator[Path]:
    """Its socket."""
    assert rig.auditor is not None
    config = parse_config(rig.config(), "auditor.toml")
    app = QuestionApplication(
        config,
        Questions(users=uids),
        rig.auditor,
        status=rig.auditor.status,
        stopping=lambda: False,
        log=Log(),
    )
    async with serving(app, rig.base / "q") as path:
        yield path


@contextlib.contextmanager
def beside(log_dir: Path, base: Path, status: Status, *, uids: tuple[int, ...] = (os.getuid(),)) -> Iterator[Path]:
    """A socket that answers questions about a log, without the steps of an auditor, so without an index. `status`: of
    the last step."""
    config = Config(
        version=1,
        origin=status.origin,
        kms_socket="",
        log_dir=str(log_dir),
        state_dir=str(base),
        signers=(),
    )
    log = Log()
    auditor: Any = SimpleNamespace(check_index=False)
    app = QuestionApplication(
        config, Questions(users=uids), auditor, status=lambda: status, stopping=lambda: False, log=log
    )
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        served = serving(app, base / "q")
        thread.start()
        try:
            yield asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(WAIT_S_MAX)
            asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(WAIT_S_MAX)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def answers(rig: Rig, *questions: dict[str, Any]) -> list[AuditAnswer]:
    async def each() -> list[AuditAnswer]:
        async with desk_of(rig) as path:
            return [(await ask(path, question)).answer for question in questions]

    return asyncio.run(each())
