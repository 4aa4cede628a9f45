"""The programs of docs/other-languages.md, generated, built and run against a socket and a gateway."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.harness.gateways import Pair

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "other-languages.md").read_text("utf-8")
INSTALL_S_MAX = 600
PRINTED = "hello\n400 decryption_failed\n"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def sh(where: Path, command: str, **variables: str) -> str:
    done = subprocess.run(
        ["sh", "-euc", command], cwd=where, env={**os.environ, **variables}, capture_output=True, text=True,
        timeout=INSTALL_S_MAX, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "docs").symlink_to(PROJECT / "docs")
    return tmp_path


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    needs.root()
    with Pair() as made:
        yield made


def printed(pair: Pair, place: Path, command: str) -> list[str]:
    """What it prints on the socket, and through the gateway."""
    cert, key = map(str, pair.client().write(place))
    files = {"CA": str(pair.gateway.ca_file), "CERT": cert, "KEY": key, "URL": f"https://localhost:{pair.gateway.port}"}
    remote = {f"PROGRESSDB_KMS_{name}": value for name, value in files.items()}
    return [sh(place, command, MINIKMS_SOCKET=str(pair.daemon.socket)), sh(place, command, **remote)]


def steps(heading: str) -> list[str]:
    section = PAGE[PAGE.index(f"\n## {heading}\n") :]
    found = re.search(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].strip().split("\n")


@pytest.mark.torture
@pytest.mark.parametrize("language", ["ts", "go"])
def test_a_program_has_at_most_40_lines(language: str) -> None:
    assert block(language).count("\n") <= 40


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_the_typescript_program_works_on_the_socket_and_through_a_gateway(pair: Pair, place: Path) -> None:
    for name in ("node", "npm", "npx"):
        needs.program(name)  # not of .ci/run, which runs no torture
    *prepare, build_and_run = steps("TypeScript")
    sh(place, "\n".join(prepare))
    (place / "client.mts").write_text(block("ts"))
    assert printed(pair, place, build_and_run) == [PRINTED, PRINTED]


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_the_go_program_works_on_the_socket_and_through_a_gateway(pair: Pair, place: Path) -> None:
    for name in ("go", "java"):
        needs.program(name)
    install, generate, run = steps("Go")
    venv = place / "venv"
    sh(place, f"{sys.executable} -m venv venv && venv/bin/{install}")
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    sh(place, generate, PATH=path)
    (place / "main.go").write_text(block("go"))
    prepare, build_and_run = run.rsplit(" && ", 1)
    sh(place, prepare)
    assert (place / "go.mod").read_text().count("require") == 0
    assert printed(pair, place, build_and_run) == [PRINTED, PRINTED]
