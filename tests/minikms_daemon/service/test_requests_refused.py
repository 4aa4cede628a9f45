"""Ways to be refused: the status, the stable code, and nothing changed.

Each verb's answer to a key that is not what it needs: test_every_kms_answer.py.
"""

import json
from typing import Any

import pytest

from minikms import api
from minikms.api.errors import BY_CODE
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import NO_KEY, ask, b64, encrypted, new_key, post


class Made:
    """Keys in each state, made once."""

    def __init__(self, daemon: LiveDaemon) -> None:
        self.active = new_key(daemon, "t")
        self.other_thread = new_key(daemon, "u")
        self.data = new_key(daemon, "t", purpose="data")
        self.retired = new_key(daemon, "t")
        self.destroyed = new_key(daemon, "t")
        self.sealed = encrypted(daemon, self.active)
        for key_id in (self.retired, self.destroyed):
            assert post(daemon, f"/keys/{key_id}/retire", {}).status == 200
        assert post(daemon, f"/keys/{self.destroyed}/destroy", {"key_id": self.destroyed}).status == 200


@pytest.fixture(scope="module")
def made(daemon: LiveDaemon) -> Made:
    return Made(daemon)


TEXT = b64(b"text")
CASES: list[tuple[str, str, object, int, str]] = [
    # what is not there
    ("GET", "/nowhere", None, 404, "not_found"),
    ("GET", "/keys/", None, 404, "not_found"),
    ("GET", "//keys/{active}", None, 404, "not_found"),
    ("POST", "/keys/{active}/unlock", {}, 404, "not_found"),
    ("GET", "/encrypt", None, 405, "method_not_allowed"),
    # bodies that are none
    ("POST", "/encrypt", b"", 400, "invalid_request"),
    ("POST", "/encrypt", b"{", 400, "invalid_request"),
    ("POST", "/encrypt", [], 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "{active}"}, 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": 1}, 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": TEXT, "add": ""}, 400, "invalid_request"),
    ("POST", "/encrypt", b'{"key_id":"{active}","key_id":"{active}","plaintext":""}', 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": TEXT, "aad": None}, 400, "invalid_request"),
    ("POST", "/decrypt", {"key_id": "{active}", "ciphertext": TEXT, "extra": 1}, 400, "invalid_request"),
    ("POST", "/encrypt_batch", {"items": [], "key_id": "x"}, 400, "invalid_request"),
    ("POST", "/encrypt_batch", {"items": [{"key_id": "{active}"}]}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": "t", "purposes": "data"}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": "t", "purpose": "root"}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": ""}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": "a b"}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": "t" * 129}, 400, "invalid_request"),
    ("POST", "/create_dek_for_thread", {"thread_id": "t", "replaces": ""}, 400, "invalid_request"),
    ("POST", "/keys/{active}/retire", {"key_id": "{active}"}, 400, "invalid_request"),
    ("POST", "/keys/{retired}/destroy", {}, 400, "invalid_request"),
    ("POST", "/keys/{retired}/destroy", {"key_id": "{active}"}, 400, "invalid_request"),
    ("POST", "/random", {"count": 0}, 400, "invalid_request"),
    ("POST", "/random", {"count": 4097}, 400, "invalid_request"),
    ("POST", "/kek/prune", {"backups": "yes"}, 400, "invalid_request"),
    ("POST", "/kek/prune", {"backups_before": "yesterday"}, 400, "invalid_request"),
    # base64 that is not the one text of its value
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": "dGV4dA"}, 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": TEXT, "aad": "-_=="}, 400, "invalid_request"),
    # ids
    ("POST", "/encrypt", {"key_id": "", "plaintext": TEXT}, 400, "invalid_request"),
    ("POST", "/encrypt", {"key_id": "../../etc/passwd", "plaintext": TEXT}, 400, "invalid_request"),
    ("GET", "/keys/..%2f..%2fkeyring", None, 400, "invalid_request"),
    ("GET", "/get_wrapped", None, 400, "invalid_request"),
    ("GET", "/get_wrapped?key_id=", None, 400, "invalid_request"),
    ("GET", "/get_wrapped?key_id={active}&key_id={active}", None, 400, "invalid_request"),
    ("GET", "/get_wrapped?key_id={active}&raw=1", None, 400, "invalid_request"),
    # listings
    ("GET", "/keys?limit=0", None, 400, "invalid_request"),
    ("GET", "/keys?limit=1001", None, 400, "invalid_request"),
    ("GET", "/keys?limit=ten", None, 400, "invalid_request"),
    ("GET", "/keys?state=destroyed", None, 400, "invalid_request"),
    ("GET", "/keys?cursor=x", None, 400, "invalid_request"),
    ("GET", "/keys?thread=t", None, 400, "invalid_request"),
    # keys that are not what is needed
    ("POST", "/encrypt", {"key_id": NO_KEY, "plaintext": TEXT}, 404, "key_not_found"),
    ("POST", "/encrypt", {"key_id": "{retired}", "plaintext": TEXT}, 409, "key_retired"),
    ("POST", "/generate_data_key", {"key_id": "{retired}"}, 409, "wrong_purpose"),
    ("POST", "/encrypt", {"key_id": "{destroyed}", "plaintext": TEXT}, 410, "key_destroyed"),
    ("POST", "/keys/{active}/destroy", {"key_id": "{active}"}, 409, "conflict"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": TEXT, "thread_id": ""}, 403, "wrong_thread"),
    ("POST", "/mac", {"key_id": "{active}", "items": [{"plaintext": ""}]}, 409, "wrong_purpose"),
    ("POST", "/decrypt", {"key_id": "{data}", "ciphertext": "{sealed}"}, 400, "decryption_failed"),
    ("POST", "/decrypt", {"key_id": "{active}", "ciphertext": TEXT}, 400, "decryption_failed"),
    # too much
    ("POST", "/encrypt_batch", {"items": [{"key_id": NO_KEY, "plaintext": ""}] * 1025}, 413, "too_many"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": b64(bytes(4 * 1024 * 1024 + 1))}, 413, "too_large"),
    ("POST", "/encrypt", {"key_id": "{active}", "plaintext": TEXT, "aad": b64(bytes(4097))}, 413, "too_large"),
]


def filled(value: Any, made: Made) -> Any:
    """`{active}` and the like stand for what was made."""
    if isinstance(value, bytes):
        return filled(value.decode("latin-1"), made).encode("latin-1") if b"{active}" in value else value
    text = value if isinstance(value, str) else json.dumps(value)
    for name, key_id in vars(made).items():
        text = text.replace("{" + name + "}", key_id)
    return text if isinstance(value, str) else json.loads(text)


@pytest.mark.parametrize(("method", "target", "body", "status", "code"), CASES)
def test_it_is_refused_with_its_status_and_code(
    daemon: LiveDaemon, made: Made, method: str, target: str, body: object, status: int, code: str
) -> None:
    sent = None if body is None else filled(body, made)
    answer = ask(daemon, method, filled(target, made), sent)
    assert (answer.status, answer.code) == (status, code), answer
    assert set(answer.body) == {"error", "code"}
    assert "Traceback" not in answer.body["error"] and "/" not in answer.body["error"].replace("docs/spec/api.md", "")


def test_nothing_of_this_has_changed_a_key(daemon: LiveDaemon, made: Made) -> None:
    states = {
        key_id: ask(daemon, "GET", f"/keys/{key_id}").body["state"]
        for key_id in (made.active, made.data, made.other_thread, made.retired)
    }
    assert states == {made.active: "active", made.data: "active", made.other_thread: "active", made.retired: "retired"}
    assert post(daemon, "/decrypt", {"key_id": made.active, "ciphertext": made.sealed}).body == {"plaintext": TEXT}


def test_each_refusal_of_a_verb_is_audited_without_what_was_sent(daemon: LiveDaemon, made: Made) -> None:
    """Also when there was no body, under the verb's name; an id that is malformed is cut short."""
    before = len(daemon.events("encrypt"))
    assert post(daemon, "/encrypt", b"{").status == 400
    assert post(daemon, "/encrypt", {"key_id": made.retired, "plaintext": b64(b"secret words")}).status == 409
    assert post(daemon, "/encrypt", {"key_id": "x" * 100_000, "plaintext": ""}).status == 400
    told = daemon.events("encrypt")[before:]
    assert [event["outcome"] for event in told] == ["invalid_request", "key_retired", "invalid_request"]
    assert told[1]["key_id"] == made.retired
    log = (daemon.data_dir / "minikms-audit.log").read_text()
    assert "secret words" not in log and b64(b"secret words") not in log
    assert "x" * 1000 not in log


def test_every_code_of_the_contract_is_one_that_the_clients_know() -> None:
    codes = {value for name, value in vars(api).items() if name.startswith("CODE_")}
    assert codes == set(BY_CODE)
