"""`minikms.Client` and `minikms.AsyncClient` at a real gateway."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import UnauthorizedError
from tests.harness import forked
from tests.harness.certificates import replace
from tests.harness.gateways import Pair
from tests.harness.tokens import OIDC_TABLE, TokenIssuer

OIDC = TokenIssuer()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(tables=OIDC_TABLE, files={"oidc.json": OIDC.jwks}) as made:
        yield made


def url(pair: Pair) -> str:
    return f"https://localhost:{pair.gateway.port}"


def shown(pair: Pair, tmp_path: Path, **how: Any) -> dict[str, Any]:
    cert, key = pair.gateway.authority.issue(uris=["spiffe://prod/chat/api"], **how).write(tmp_path)
    return {"ca": pair.gateway.ca_file, "cert": cert, "key": key}


async def test_an_asyncio_client_batches_through_the_gateway(pair: Pair, tmp_path: Path) -> None:
    before = pair.gateway.metric("requests_total", verb="encrypt_batch")

    async with minikms.AsyncClient(url(pair), **shown(pair, tmp_path)) as client:
        key = await client.create_dek_for_thread("thread-1")
        texts = [b"%d" % number for number in range(300)]
        sealed = await asyncio.gather(*(client.encrypt(key.key_id, text) for text in texts))
        assert await asyncio.gather(*(client.decrypt(key.key_id, one) for one in sealed)) == texts
    assert pair.gateway.metric("requests_total", verb="encrypt_batch") > before


def test_a_token_that_is_replaced_on_the_disk_is_taken_up(pair: Pair, tmp_path: Path) -> None:
    """While calls run; also when the one before is refused."""
    file = tmp_path / "token"
    replace(file, OIDC.token(sub="first").encode(), 0o600)
    with minikms.Client(url(pair), ca=pair.gateway.ca_file, token_file=file) as client:
        for number in range(10):
            client.random(8)
            assert pair.audited()[-1]["actor"].endswith("first" if not number else f"next-{number - 1}")
            replace(file, OIDC.token(sub=f"next-{number}").encode(), 0o600)
        replace(file, OIDC.token(exp=1, iat=0).encode(), 0o600)
        with pytest.raises(UnauthorizedError):
            client.random(8)
        replace(file, OIDC.token(sub="last").encode(), 0o600)
        client.random(8)


def test_the_command_uses_the_gateway_that_its_environment_names(pair: Pair, tmp_path: Path) -> None:
    files = {f"PROGRESSDB_KMS_{name.upper()}": str(path) for name, path in shown(pair, tmp_path).items()}
    environ = {"PATH": os.environ["PATH"], "PROGRESSDB_KMS_URL": url(pair), **files}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return forked.run("minikms", *words, env=environ | more, cwd=tmp_path)

    status = run("status")
    assert (status.returncode, status.stdout.startswith("ok: up ")) == (0, True), status
    assert run("keys", "list").returncode == 0
    refused = run("seal", "--yes")
    assert (refused.returncode, "own socket" in refused.stderr) == (1, True), refused
    both = run("status", PROGRESSDB_KMS_SOCKET="/run/s")
    assert (both.returncode, "unset one of them" in both.stderr) == (2, True), both
