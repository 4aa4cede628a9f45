"""The parts of uvicorn that `api/http/protocol.py` subclasses are those of the version that the project names.

uvicorn promises nothing about them. A new version that changes one of them fails here, by name, before it fails on a
connection.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import tomllib
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from progressdb_server.api.http.protocol import BoundedProtocol, DirectCycle
from progressdb_server.api.http.shares import Shares

PROJECT = Path(__file__).resolve().parents[3]
OVERRIDDEN = (
    "connection_made",
    "connection_lost",
    "data_received",
    "eof_received",
    "send_400_response",
    "on_message_begin",
    "on_url",
    "on_header",
    "on_headers_complete",
    "on_body",
    "on_message_complete",
    "on_response_complete",
    "_start_asgi_task",
)
INHERITED = (
    "_unsupported_upgrade_warning",
    "pause_writing",
    "resume_writing",
    "shutdown",
    "timeout_keep_alive_handler",
)
"""Methods that uvicorn or this project calls, as uvicorn has them."""
OF_THE_PROTOCOL = {
    "app",
    "app_state",
    "asgi_version",
    "client",
    "connections",
    "cycle",
    "expect_100_continue",
    "flow",
    "headers",
    "logger",
    "loop",
    "parser",
    "pipeline",
    "scheme",
    "server",
    "server_state",
    "tasks",
    "timeout_keep_alive",
    "transport",
}
"""Attributes that this project reads or sets."""
NOT_OF_OUR_CYCLE = {"access_log", "access_logger", "body"}
"""Attributes of uvicorn's cycle that serve what this server does not use."""


async def _application(scope: Any, receive: Any, send: Any) -> None:
    """Never called."""


def configuration() -> uvicorn.Config:
    return uvicorn.Config(_application, log_config=None)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_exactly_one_version_of_uvicorn_is_required() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    required = [name for name in project["dependencies"] if name.startswith("uvicorn")]
    assert required == [f"uvicorn=={importlib.metadata.version('uvicorn')}"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_of_the_protocol_takes_the_same(name: str) -> None:
    assert len(parameters(vars(BoundedProtocol)[name])) == len(parameters(vars(HttpToolsProtocol)[name]))


@pytest.mark.parametrize("name", INHERITED)
def test_an_inherited_method_of_the_protocol_is_there(name: str) -> None:
    assert callable(vars(HttpToolsProtocol)[name])
    assert name not in vars(BoundedProtocol)


def test_every_other_method_of_the_protocol_is_one_that_is_not_called() -> None:
    known = {*OVERRIDDEN, *INHERITED}
    others = {
        name for name, value in vars(HttpToolsProtocol).items() if inspect.isfunction(value) and name not in known
    }
    assert others == {
        "__init__",
        "_get_upgrade",
        "_should_upgrade",
        "_should_upgrade_to_ws",
        "_unset_keepalive_if_required",
        "handle_websocket_upgrade",
    }


def test_the_protocol_has_the_attributes_that_are_used() -> None:
    async def run() -> None:
        made = HttpToolsProtocol(configuration(), ServerState(), {})
        assert vars(made).keys() >= OF_THE_PROTOCOL
        assert isinstance(made.pipeline, deque)

    asyncio.run(run())


def test_the_state_of_the_server_has_the_attributes_that_are_used() -> None:
    state = ServerState()
    assert (state.total_requests, state.connections, state.tasks, state.default_headers) == (0, set(), set(), [])


def test_our_cycle_sets_every_attribute_of_the_cycle_of_uvicorn() -> None:
    """Its `run_asgi` and `send_500_response` are inherited and read them."""

    async def run() -> None:
        nothing: Any = None
        theirs = RequestResponseCycle(*[nothing] * (len(parameters(RequestResponseCycle.__init__)) - 1))
        ours = DirectCycle({}, nothing, nothing, [], False, True, print, Shares())
        missing = {name for name in vars(theirs) if not hasattr(ours, name)}
        assert missing == NOT_OF_OUR_CYCLE
        methods = {name for name, value in vars(RequestResponseCycle).items() if inspect.isfunction(value)}
        assert methods == {"__init__", "run_asgi", "send_500_response", "send", "receive"}

    asyncio.run(run())


def test_what_is_imported_beside_the_classes_is_of_the_known_kind() -> None:
    assert STATUS_LINE[204] == b"HTTP/1.1 204 No Content\r\n"
    assert isinstance(HIGH_WATER_LIMIT, int)
    for name in ("drain", "pause_reading", "pause_writing", "resume_reading", "resume_writing"):
        assert callable(vars(FlowControl)[name])


def test_the_server_of_uvicorn_has_the_methods_that_are_replaced() -> None:
    assert parameters(uvicorn.Server.startup) == ["self", "sockets"]
    assert parameters(uvicorn.Server.capture_signals) == ["self"]
    assert uvicorn.Server(configuration()).should_exit is False
