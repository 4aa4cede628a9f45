"""`minikms.Client` and `minikms.AsyncClient` at a real gateway."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import KmsCredentialsError, KmsUntrustedServerError, UnauthorizedError
from tests.harness import forked
from tests.harness.certificates import Authority, replace
from tests.harness.gateways import Pair
from tests.harness.tokens import ISSUER, TokenIssuer

OIDC = TokenIssuer()
TABLE = (
    f'[[issuer]]\nkind = "oidc"\nissuer = "{ISSUER}"\naudience = "minikms"\nalgorithms = ["ES256"]\n'
    'jwks_file = "oidc.json"\n'
)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(tables=TABLE, files={"oidc.json": OIDC.jwks}) as made:
        yield made


def url(pair: Pair) -> str:
    return f"https://localhost:{pair.gateway.port}"


def shown(pair: Pair, tmp_path: Path, **how: Any) -> dict[str, Any]:
    cert, key = pair.gateway.authority.issue(uris=["spiffe://prod/chat/api"], **how).write(tmp_path)
    return {"ca": pair.gateway.ca_file, "cert": cert, "key": key}


def test_a_client_with_a_certificate_uses_its_keys(pair: Pair, tmp_path: Path) -> None:
    with minikms.Client(url(pair), **shown(pair, tmp_path)) as client:
        key = client.create_dek_for_thread("thread-1")
        sealed = client.encrypt(key.key_id, b"hello", aad=b"1")
        assert client.decrypt(key.key_id, sealed, aad=b"1") == b"hello"


def test_an_asyncio_client_batches_through_the_gateway(pair: Pair, tmp_path: Path) -> None:
    before = pair.gateway.metric("requests_total", verb="encrypt_batch")

    async def check() -> None:
        async with minikms.AsyncClient(url(pair), **shown(pair, tmp_path)) as client:
            key = await client.create_dek_for_thread("thread-1")
            texts = [b"%d" % number for number in range(300)]
            sealed = await asyncio.gather(*(client.encrypt(key.key_id, text) for text in texts))
            assert await asyncio.gather(*(client.decrypt(key.key_id, one) for one in sealed)) == texts

    asyncio.run(check())
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


def test_a_refused_certificate_is_no_outage(pair: Pair, tmp_path: Path) -> None:
    """It is not tried again and again for as long as an outage would be."""
    other = Authority("another root").issue(uris=["spiffe://prod/chat/api"])
    cert, key = other.write(tmp_path)
    before = pair.gateway.refused("unknown_ca")
    with (
        minikms.Client(url(pair), ca=pair.gateway.ca_file, cert=cert, key=key, wait_s=60) as client,
        pytest.raises(KmsCredentialsError),
    ):
        client.random(8)
    assert pair.gateway.refused("unknown_ca") - before <= 2


def test_a_gateway_of_another_ca_gets_nothing(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_bytes(Authority("another root").pem)
    good = shown(pair, tmp_path) | {"ca": tmp_path / "other.pem"}
    before = pair.gateway.metric("requests_total", verb="random")
    with minikms.Client(url(pair), **good) as client, pytest.raises(KmsUntrustedServerError):
        client.random(8)
    assert pair.gateway.metric("requests_total", verb="random") == before


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
