"""The verbs through the gateway, with client certificates."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from tests.harness.callers import Caller
from tests.harness.gateways import Pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


@pytest.fixture
def caller(pair: Pair) -> Iterator[Caller]:
    with pair.gateway.caller(pair.client()) as made:
        yield made


def test_a_certificate_encrypts_and_decrypts(pair: Pair, caller: Caller) -> None:
    key = caller.post("/create_dek_for_thread", {"thread_id": "t-1"}).body["key_id"]
    plain = base64.b64encode(b"hello").decode()
    sealed = caller.post("/encrypt", {"key_id": key, "plaintext": plain}).body["ciphertext"]
    assert caller.post("/decrypt", {"key_id": key, "ciphertext": sealed}).body == {"plaintext": plain}
    [made] = [event for event in pair.audited() if event["type"] == "create_dek" and event.get("key_ids") == [key]]
    assert made["actor"] == "spiffe://prod/chat/api"
