"""Load from the client libraries while certificates and tokens are renewed, and while the gateway is killed."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

import minikms
from minikms.client import AsyncClient, Client
from tests.harness.certificates import SERVER, replace
from tests.harness.gateways import HOST, Pair
from tests.harness.tokens import ISSUER, OIDC_TABLE, TokenIssuer
from tests.harness.waiting import WAIT_S_MAX, wait_until

ROUNDS = 6
LIFE = datetime.timedelta(seconds=12)
OIDC = TokenIssuer()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(tables=OIDC_TABLE, files={"oidc.json": OIDC.jwks}) as made:
        yield made


class Renewal(Protocol):
    """Gives the client the name of this number."""

    def __call__(self, pair: Pair, directory: Path, number: int) -> str: ...


def certificate(pair: Pair, directory: Path, number: int) -> str:
    """Of another intermediate CA each time. The gateway's own certificate is renewed too."""
    name = f"spiffe://prod/chat/renewed-{number}"
    pair.gateway.root.below(f"issuing CA {number}").issue(uris=[name]).write(directory)
    own = pair.gateway.authority.issue(dns=[HOST, "localhost"], extended=[SERVER])
    pair.gateway.write("server.key", own.key, private=True)
    pair.gateway.write("server.pem", own.chain)
    return name


def token(pair: Pair, directory: Path, number: int) -> str:
    replace(directory / "token", OIDC.token(sub=f"renewed-{number}").encode())
    return f"oidc:{ISSUER}|renewed-{number}"


def arguments(pair: Pair, directory: Path, renew: Renewal) -> dict[str, Any]:
    files: dict[str, Any] = {"token_file": directory / "token"}
    if renew is certificate:
        files = {"cert": directory / "client.pem", "key": directory / "client.key"}
    return {"address": f"https://localhost:{pair.gateway.port}", "ca": pair.gateway.ca_file, **files}


class Load:
    """Calls without end from a blocking and an asyncio client, until it is left. `done`: calls that succeeded."""

    def __init__(self, options: dict[str, Any], key_id: str) -> None:
        self.done = [0, 0]
        self.sealed: list[bytes] = []
        self.failures: list[minikms.KmsError] = []
        self._options = options
        self._key_id = key_id
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._blocking, self._asyncio)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S_MAX)
            assert not thread.is_alive()

    def wait_for_more(self) -> None:
        """Returns once each client has had further answers."""
        before = list(self.done)
        wait_until(lambda: all(now > then + 1 for now, then in zip(self.done, before, strict=True)))

    def _blocking(self) -> None:
        with Client(**self._options) as client:
            while not self._stop.is_set():
                try:
                    self.sealed.append(client.encrypt(self._key_id, b"kept"))
                    self.done[0] += 1
                except minikms.KmsError as error:
                    self.failures.append(error)

    def _asyncio(self) -> None:
        async def main() -> None:
            async with AsyncClient(**self._options) as client:
                while not self._stop.is_set():
                    calls = [client.encrypt(self._key_id, b"kept") for _ in range(4)]
                    for outcome in await asyncio.gather(*calls, return_exceptions=True):
                        if isinstance(outcome, bytes):
                            self.sealed.append(outcome)
                            self.done[1] += 1
                        else:
                            assert isinstance(outcome, minikms.KmsError)
                            self.failures.append(outcome)

        asyncio.run(main())


def new_key(options: dict[str, Any]) -> str:
    with Client(**options) as client:
        return client.create_dek_for_thread("t").key_id


@pytest.mark.parametrize("renew", [certificate, token])
def test_no_call_fails_while_certificates_or_tokens_are_renewed(pair: Pair, tmp_path: Path, renew: Renewal) -> None:
    names = [renew(pair, tmp_path, 0)]
    options = arguments(pair, tmp_path, renew) | {"timeout_s": WAIT_S_MAX}
    with Load(options, new_key(options)) as load:
        for number in range(1, ROUNDS):
            load.wait_for_more()
            names.append(renew(pair, tmp_path, number))
        load.wait_for_more()
    assert load.failures == []
    actors = {event["actor"] for event in pair.audited() if event["type"].startswith("encrypt")}
    assert actors >= set(names), "each name was used"


@pytest.mark.torture
def test_certificates_that_live_for_seconds_are_renewed(pair: Pair, tmp_path: Path) -> None:
    """Each one expires while the load goes on."""
    certificate(pair, tmp_path, 0)
    options = arguments(pair, tmp_path, certificate)
    with Load(options, new_key(options)) as load:
        load.wait_for_more()  # a client that starts between the writes of certificate and key can use neither
        for _ in range(30):
            pair.gateway.authority.issue(uris=["spiffe://prod/chat/short"], ends=LIFE).write(tmp_path)
            time.sleep(1)
    assert load.failures == []
    assert min(load.done) > 30


def test_a_killed_gateway_is_unavailable_and_no_answer_is_lost(pair: Pair, tmp_path: Path) -> None:
    certificate(pair, tmp_path, 0)
    options = arguments(pair, tmp_path, certificate) | {"timeout_s": WAIT_S_MAX}
    key_id = new_key(options)
    with Load(options | {"wait_s": 0.0}, key_id) as load:
        load.wait_for_more()
        pair.gateway.kill()
        wait_until(lambda: load.failures)
        pair.gateway.start()
        load.wait_for_more()
    assert {type(failure) for failure in load.failures} == {minikms.KmsUnavailableError}
    with Client(**options) as client:
        items = [minikms.DecryptItem(key_id=key_id, ciphertext=sealed) for sealed in load.sealed]
        assert set(client.decrypt_batch(items)) == {b"kept"}


def test_a_patient_call_outlives_a_restart_of_the_gateway(pair: Pair, tmp_path: Path) -> None:
    certificate(pair, tmp_path, 0)
    options = arguments(pair, tmp_path, certificate) | {"timeout_s": WAIT_S_MAX, "wait_s": WAIT_S_MAX}
    with Client(**options) as client:
        assert client.health()
        pair.gateway.kill()
        starting = threading.Thread(target=pair.gateway.start)
        starting.start()
        assert client.status().status == "ok"
        starting.join(WAIT_S_MAX)
