"""The examples of the docstrings do what they say, and docs/client.md names every method and error."""

import asyncio
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from minikms import AsyncClient, Client
from minikms.api import errors

PAGE = (Path(__file__).parents[3] / "docs" / "client.md").read_text(encoding="utf-8")
SOCKET = "/run/minikms/minikms.sock"


def example_of(kind: type) -> str:
    lines = inspect.cleandoc(kind.__doc__ or "").splitlines()
    indented = [line for line in lines if line.startswith(" " * 4)]
    return textwrap.dedent("\n".join(indented))


def test_the_example_of_the_blocking_client_runs(daemon_socket: str) -> None:
    exec(example_of(Client).replace(SOCKET, daemon_socket), {"Client": Client})


def test_the_example_of_the_asyncio_client_runs(daemon_socket: str) -> None:
    body = textwrap.indent(example_of(AsyncClient).replace(SOCKET, daemon_socket), "    ")
    space: dict[str, Any] = {"AsyncClient": AsyncClient}
    exec(f"async def main():\n{body}", space)
    asyncio.run(space["main"]())


def test_the_page_names_every_method_and_every_error_that_is_not_a_refusal() -> None:
    methods = {name for name in dir(Client) if callable(getattr(Client, name)) and name[0] != "_"} - {"close"}
    assert methods == set(re.findall(r"`(\w+)\(", PAGE.partition("## Methods")[2].partition("## Errors")[0]))
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.KmsError) and kind.__base__ is errors.KmsError:
            assert f"`{name}" in PAGE
