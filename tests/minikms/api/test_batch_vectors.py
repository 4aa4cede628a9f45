"""Known answers of docs/spec/api.md: daemon and clients read and write the same MessagePack."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import errors
from minikms.client import calls
from minikms.client.calls import make_call
from minikms.client.items import Batch
from minikms.client.wire import Answer
from minikms.http import Response
from minikms_daemon.server import strictmsgpack
from minikms_daemon.service.encoding import RefusedItem, encoding_of

VECTORS = Path(__file__).parents[2] / "vectors"
KNOWN: dict[str, Any] = json.loads((VECTORS / "batches.json").read_text())
VERBS = {verb.name: verb for verb in api.VERBS if verb.is_batch}


def test_the_script_reproduces_the_vectors() -> None:
    subprocess.run([sys.executable, str(VECTORS / "make_batches.py"), "--check"], check=True)


def as_vector(value: Any) -> Any:
    """A decoded request as the vectors write it: absent members are left out, bytes are hexadecimal."""
    if isinstance(value, msgspec.Struct):
        members = {name: getattr(value, name) for name in value.__struct_fields__}
        return {name: as_vector(member) for name, member in members.items() if member is not None}
    if isinstance(value, list):
        return [as_vector(one) for one in value]
    return value.hex() if isinstance(value, bytes) else value


@pytest.mark.parametrize("known", KNOWN["requests"], ids=lambda known: f"{known['verb']}, {known['name']}")
def test_the_daemon_reads_a_known_request(known: dict[str, Any]) -> None:
    request = strictmsgpack.Decoder(VERBS[known["verb"]].request).decode(bytes.fromhex(known["msgpack"]))
    assert as_vector(request) == known["json"]


@pytest.mark.parametrize("known", KNOWN["answers"])
def test_the_daemon_writes_a_known_answer_and_clients_read_it(known: dict[str, Any]) -> None:
    verb, wire, in_json = VERBS[known["verb"]], bytes.fromhex(known["msgpack"]), known["json"]
    empty = next(one for one in KNOWN["requests"] if one["verb"] == verb.name)
    encoding = encoding_of(strictmsgpack.Decoder(verb.request).decode(bytes.fromhex(empty["msgpack"])))
    read: Any = make_call(verb, Batch([]), msgpack=True).read(Answer(200, wire, True))
    if verb is api.CHECK_BATCH:
        refused = [api.RefusedItemAnswer(**one) for one in in_json["refused"]]
        written = encoding.answer(api.CheckBatchAnswer(in_json["opened"], refused))
        assert as_vector(read) == in_json
    else:
        member = "plaintext" if verb is api.DECRYPT_BATCH else "ciphertext"
        outcomes = [
            bytes.fromhex(one[member]) if member in one else RefusedItem(one["error"], one["code"])
            for one in in_json["items"]
        ]
        refused_count = sum(isinstance(outcome, RefusedItem) for outcome in outcomes)
        written = encoding.items(member, outcomes, refused_count)
        for outcome, known_outcome in zip(calls.outcomes(read, len(outcomes)), outcomes, strict=True):
            if isinstance(known_outcome, bytes):
                assert outcome == known_outcome
            else:
                assert isinstance(outcome, errors.DecryptionError)
                assert (outcome.message, outcome.code) == known_outcome
    assert isinstance(written, Response)
    assert (written.status, written.content_type, written.body) == (200, api.MSGPACK, wire)
