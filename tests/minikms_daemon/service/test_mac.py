"""`/mac`: HMACs under keys that do nothing else."""

import base64
import hmac
import json
from pathlib import Path

import msgspec
import pytest

from minikms import api
from minikms.api import ROLES
from minikms.api.errors import ForbiddenError, WrongPurposeError
from minikms.policy.principal import Principal
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.records import RecordVerbs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import SilentAudit, create, opened_vault
from tests.minikms_daemon.service.asking import b64, new_key, post

ANYONE = Principal(0, 0, "peer_uid:0", ROLES)


async def test_a_mac_is_that_of_the_key_in_the_file(tmp_path: Path) -> None:
    """Computed from docs/spec/formats.md. It takes the role `encrypt` alone."""
    async with opened_vault(tmp_path / "d") as one:
        key_id = (await create(one.vault, "t", purpose="mac")).id
        table = VerbTable(SilentAudit())
        RecordVerbs(one.vault, table)
        request = api.MacRequest(
            key_id, [api.MacItemRequest(b64(b"text"), b64(b"place")), api.MacItemRequest(b64(b"text"))]
        )
        with pytest.raises(ForbiddenError):
            table[api.MAC](msgspec.structs.replace(ANYONE, roles=ROLES - {"encrypt"}), request, "")
        alone = msgspec.structs.replace(ANYONE, roles=frozenset[api.Role](["encrypt"]))
        answer = table[api.MAC](alone, request, "")
        assert isinstance(answer, bytes)
        label, text = b"minikms/mac/v1\0", b"\0\0\0\4text"
        assert [base64.b64decode(mac) for mac in json.loads(answer)["macs"]] == [
            hmac.digest(one.keys([key_id])[key_id], label + aad + text, "sha256")
            for aad in (b"\0\0\0\5place", b"\0\0\0\0")
        ]


async def test_a_key_makes_macs_or_records_and_never_both(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        purposes: tuple[api.Purpose, ...] = ("thread", "data", "mac")
        keys = [one.vault.opened((await create(one.vault, "t", purpose=each)).id) for each in purposes]
        for key in keys[:2]:
            assert key.open(key.seal(b"text", b""), b"") == b"text"
            with pytest.raises(WrongPurposeError):
                key.mac(b"text", b"")
        for act in (
            lambda: keys[2].seal(b"text", b""),
            lambda: keys[2].open(bytes(40), b""),
            lambda: keys[2].check(bytes(40), b"", memoryview(bytearray(8))),
        ):
            with pytest.raises(WrongPurposeError):
                act()


def test_each_verb_of_records_refuses_a_key_of_macs(daemon: LiveDaemon) -> None:
    key_id, other = (new_key(daemon, purpose="mac") for _ in range(2))
    plain = {"key_id": key_id, "plaintext": ""}
    sealed = {"key_id": key_id, "ciphertext": b64(bytes(40))}
    moved = [{"ciphertext": b64(bytes(40))}]
    for verb, body in (("encrypt", plain), ("decrypt", sealed), ("generate_data_key", {"key_id": key_id})):
        assert [post(daemon, f"/{verb}", body).code for _ in range(2)] == ["wrong_purpose"] * 2
    batches: dict[str, dict[str, object]] = {
        "encrypt_batch": {"items": [plain]},
        "decrypt_batch": {"items": [sealed]},
        "reencrypt_batch": {"from_key_id": key_id, "to_key_id": other, "items": moved},
        "check_batch": {"key_id": key_id, "items": moved},
    }
    for verb, batch in batches.items():
        answer = post(daemon, f"/{verb}", batch).body
        assert [each["code"] for each in answer.get("items", answer.get("refused"))] == ["wrong_purpose"], verb


def test_a_retired_key_makes_macs_until_it_is_destroyed(daemon: LiveDaemon) -> None:
    """What was made with it is compared and searched."""
    key_id = new_key(daemon, purpose="mac")
    ask = {"key_id": key_id, "items": [{"plaintext": b64(b"ada")}]}
    before = post(daemon, "/mac", ask).body
    assert post(daemon, f"/keys/{key_id}/retire", {}).status == 200
    assert post(daemon, "/mac", ask).body == before
    assert post(daemon, f"/keys/{key_id}/destroy", {"key_id": key_id}).status == 200
    assert post(daemon, "/mac", ask).code == "key_destroyed"


def test_one_line_of_the_audit_log_has_key_and_count_refused_or_not(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon, purpose="mac")
    before = len(daemon.events("mac"))
    for plaintext, others in ((b64(b"ada"), {}), (b64(b"ada"), {"thread_id": "u"}), ("-", {})):
        post(daemon, "/mac", {"key_id": key_id, "items": [{"plaintext": plaintext}] * 3, **others})
    lines = daemon.events("mac")[before:]
    assert [line["outcome"] for line in lines] == ["ok", "wrong_thread", "invalid_request"]
    assert all((line["key_ids"], line["count"]) == ([key_id], 3) for line in lines)
    assert b64(b"ada") not in (daemon.data_dir / "minikms-audit.log").read_text()
