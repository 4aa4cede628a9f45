"""Schemathesis, a third-party tester for OpenAPI, compares the document with the live server."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, signature
from tests.progressdb_server.api.real_server import RealServer
from tests.progressdb_server.api.sdk import PATIENCE, TEST_S_MAX, environment
from tests.progressdb_server.api.viewer_client import ViewerClient

pytestmark = pytest.mark.timeout(TEST_S_MAX)
REQUIREMENTS = ("schemathesis==4.32.5",)
RUN_S_MAX = 480.0
EXAMPLES = 1
"""Random ones of each operation, beside the examples and the bounds that Schemathesis derives; torture draws more."""
EXAMPLES_IN_TORTURE = 4
PHASES = "examples,coverage,fuzzing,stateful"
FEW_PHASES = {"front end": "examples,fuzzing,stateful"}
"""Of the normal suite, where it is not PHASES: the bounds of these operations' schemas are those of the run `admin`."""
SEED = 1
"""Of the requests in the normal suite; Schemathesis prints the seed of a run that failed."""
CONFIGURATION = """
[checks.positive_data_acceptance]
# A valid request may name an id that does not exist or is another user's, and login attempts are limited.
expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "429"]
"""
VIEWER_CONFIGURATION = CONFIGURATION.replace('"401"', '"400", "401"')
"""A schema can't say that a page takes one of two cursors. It is a 400 only for a thread that another run made."""
ADMINS = {"X-API-Key": ADMIN, "X-User-ID": "alice"}
BACKENDS = {"X-API-Key": BACKEND, "X-User-ID": "alice"}
FRONTENDS = {"X-API-Key": FRONTEND, "X-User-ID": "alice", "X-User-Signature": signature("alice")}
CONVERSATIONS = ["--include-tag", "threads", "--include-tag", "messages", "--include-tag", "reactions"]
RUNS: dict[str, tuple[dict[str, str], list[str]]] = {
    "admin": (ADMINS, ["--exclude-tag", "viewer"]),
    "backend": (BACKENDS, ["--include-tag", "users"]),  # what no other key may call
    "front end": (FRONTENDS, CONVERSATIONS),
    # Only valid requests: without a session, invalid ones too are redirected to the login page.
    "viewer": (ADMINS, ["--include-tag", "viewer", "--mode", "positive"]),
}


@pytest.mark.parametrize("run", [run for run in RUNS if run != "backend"])
def test_the_document_is_true_of_the_live_server(server: RealServer, run: str, tmp_path: Path) -> None:
    """Valid requests are answered as described, invalid ones refused; no status, header, type or method is left out.

    The one operation of the run `backend` is left to torture: `test_every_answer.py` gets every answer of it.
    """
    check(server, run, tmp_path, SEED, EXAMPLES, FEW_PHASES.get(run, PHASES))


@pytest.mark.torture
@pytest.mark.parametrize("run", RUNS)
def test_the_document_is_true_of_the_live_server_for_new_requests(server: RealServer, run: str, tmp_path: Path) -> None:
    check(server, run, tmp_path, random.getrandbits(32), EXAMPLES_IN_TORTURE, PHASES)


def check(server: RealServer, run: str, tmp_path: Path, seed: int, examples: int, phases: str) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(PATIENCE + (VIEWER_CONFIGURATION if run == "viewer" else CONFIGURATION))
    caller, chosen = RUNS[run]
    # The header names the user, because a schema can't say that the query or the body may name it instead.
    headers = {**caller, "X-Identity": "alice"}
    if run == "viewer":
        client = ViewerClient(server.port)
        assert client.login(ADMIN).status == 303
        headers["Cookie"] = f"progressdb_viewer={client.cookies['progressdb_viewer']}"
    words = [str(environment("schemathesis-4.32.5", REQUIREMENTS).with_name("schemathesis"))]
    document = tmp_path / "openapi.yaml"  # Schemathesis itself waits ten seconds for it, which a busy machine may take
    document.write_bytes(server("GET", "/openapi.yaml").body)
    words += ["--config-file", str(configuration), "run", str(document), *chosen]
    words += ["--url", f"http://127.0.0.1:{server.port}"]
    for name, value in headers.items():
        words += ["--header", f"{name}: {value}"]
    words += ["--phases", phases, "--max-examples", str(examples), "--checks", "all"]
    # bounds are in bytes, schemas count characters; a NUL can't be sent in a header at all
    words += ["--generation-codec", "ascii", "--generation-allow-x00", "false", "--generation-database", "none"]
    words += ["--seed", str(seed), "--no-color", "--no-shrink", "--warnings", "off"]
    variables = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 selected" not in done.stdout
    unexpected = [event for event in server.log if event["event"] in ("request failed", "store_write_failed")]
    assert unexpected == []
