"""Root keys through a real daemon: adding, testing and removing them while it serves, and what each opens then."""

import json
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api.errors import NotTestedError
from minikms.audit import Event
from minikms.crypto import roots
from minikms.custody.vault import permitted
from minikms.keys import root_slots
from minikms.platform.clock import now_ns, rfc3339
from minikms_daemon.service import roots as service_roots
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.roots import AddGivenRoot, GivenRootTest, RootVerbs
from tests.harness import decryptor
from tests.harness.live_daemon import LiveDaemon, keys_in
from tests.harness.vaults import SilentAudit, opened_vault
from tests.minikms_daemon.service.asking import Answer, ask, b64, new_key, post, status, status_once
from tests.minikms_daemon.service.test_kek_rotation import Records, keks, no_rotation, refusal, restart, rotate

SPARE = bytes(range(60, 92)).hex()
OTHER = bytes(range(7, 39)).hex()
SHARES = {"set_id": "00112233aabbccdd", "threshold": 2, "digests": [b64(bytes([n]) * 32) for n in range(3)]}


def fingerprint(root: str) -> str:
    return roots.fingerprint(memoryview(bytes.fromhex(root)))


def listed(daemon: LiveDaemon) -> list[dict[str, Any]]:
    answer = ask(daemon, "GET", "/roots")
    assert answer.status == 200, answer
    found: list[dict[str, Any]] = answer.body["roots"]
    return found


def add(daemon: LiveDaemon, root: str = SPARE, **others: object) -> Answer:
    return post(daemon, "/roots", {"provider": "file", "root_hex": root, **others})


def added(daemon: LiveDaemon, root: str = SPARE, **others: object) -> str:
    answer = add(daemon, root, **others)
    assert answer.status == 200, answer
    return str(answer.body["slot_id"])


def test(daemon: LiveDaemon, slot_id: str, root: str) -> Answer:
    return post(daemon, f"/roots/{slot_id}/test", {"root_hex": root})


def remove(daemon: LiveDaemon, slot_id: str) -> Answer:
    return ask(daemon, "POST", f"/roots/{slot_id}/remove")


test.__test__ = False  # type: ignore[attr-defined]  # a verb, not a test


# --- adding and testing ---------------------------------------------------------------------------------------------


def test_an_added_root_opens_the_keyring_beside_the_first(own_daemon: LiveDaemon) -> None:
    records, first = Records(own_daemon), own_daemon.root().hex()
    before = keks(own_daemon)
    answer = add(own_daemon, provider="shares", shares=SHARES)
    assert answer.status == 200
    slot_id = answer.body["slot_id"]
    assert answer.body["shares"] == {"set_id": "00112233aabbccdd", "threshold": 2, "count": 3}
    one, two = listed(own_daemon)
    assert two == answer.body
    assert status(own_daemon)["root"]["fingerprint"] == fingerprint(first)
    assert (one["slot_id"], one["in_use"], one["fingerprint"]) == ("s1", True, fingerprint(first))
    assert (two["state"], two["provider"], two["fingerprint"]) == ("active", "shares", fingerprint(SPARE))
    assert (keks(own_daemon), status(own_daemon)["warnings"]) == (before, status(own_daemon)["warnings"])
    assert not any("more than one root key" in text for text in status(own_daemon)["warnings"])
    for root in (SPARE, first):
        restart(own_daemon, root)
        assert records.open()
        assert [each["in_use"] for each in listed(own_daemon)] == [root == first, root == SPARE]
    begun, line = own_daemon.events("add_root")
    assert begun["detail"] == "begun"
    assert line["facts"]["slot_id"] == slot_id
    assert line["facts"]["epoch"] > 1
    assert SPARE not in (own_daemon.data_dir / "minikms-audit.log").read_text() + own_daemon.log.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"provider": ""},
        {"provider": "x" * 33},
        {"provider": "a b"},
        {"shares": {**SHARES, "threshold": 4}},
        {"shares": {**SHARES, "threshold": 1}},
        {"shares": {**SHARES, "set_id": "x"}},
        {"shares": {**SHARES, "digests": [b64(b"short")] * 3}},
        {"shares": {**SHARES, "digests": [b64(bytes(32))] * 17}},
        {"shares": {**SHARES, "digests": [b64(bytes(900))] * 3}},
        {"slot_id": "s1"},
        {"root_hex": SPARE[:-1]},
        {"root_hex": SPARE + "0"},
        {"root_hex": None},
        {"provider": "file\\"},
    ],
)
def test_a_malformed_root_changes_nothing_and_leaves_no_key(daemon: LiveDaemon, change: dict[str, object]) -> None:
    before = listed(daemon)
    answer = post(daemon, "/roots", {"provider": "file", "root_hex": SPARE, **change})
    assert (answer.status, answer.code) == (400, "invalid_request"), answer
    assert listed(daemon) == before
    said = json.dumps(answer.body) + daemon.log.read_text() + (daemon.data_dir / "minikms-audit.log").read_text()
    assert SPARE[:60] not in said


def test_only_the_root_of_the_slot_passes_its_test(own_daemon: LiveDaemon) -> None:
    slot_id = added(own_daemon)
    epoch = status(own_daemon)["epoch"]
    answer = test(own_daemon, slot_id, SPARE)
    assert (answer.status, answer.body["slot_id"]) == (200, slot_id)
    assert status(own_daemon)["epoch"] == epoch + 1
    wrong = test(own_daemon, slot_id, own_daemon.root().hex())
    assert (wrong.status, wrong.code) == (409, "wrong_slot")
    assert "it opens slot s1" in wrong.body["error"]
    assert "it opens no slot" in test(own_daemon, slot_id, OTHER).body["error"]
    for unknown in ("s999", "x", "s1%2f", "..", "s" + "1" * 40):
        assert test(own_daemon, unknown, SPARE).status == 404
    assert post(own_daemon, "/roots/s1/test", {"root_hex": SPARE, "slot_id": "s1"}).code == "invalid_request"


def test_a_digest_that_looks_like_a_share_is_kept_as_it_is(own_daemon: LiveDaemon) -> None:
    """A key among the digests is overwritten all the same."""
    digests = ["mks1" + "A" * 39 + "=", b64(bytes(32))]
    added(own_daemon, provider="shares", shares={**SHARES, "digests": digests})
    body = json.loads((own_daemon.data_dir / "keyring.json").read_bytes())["body"]
    assert body["slots"][1]["shares"]["digests"] == digests
    for hidden in (SPARE, "mks1" + "A" * 60):
        answer = add(own_daemon, OTHER, shares={**SHARES, "digests": [*digests, hidden]})
        assert answer.status == 400
        assert hidden not in json.dumps(answer.body)


# --- removing -------------------------------------------------------------------------------------------------------


def test_a_removed_root_opens_no_later_keyring_and_no_later_dek(own_daemon: LiveDaemon) -> None:
    """Keyring key, audit key and KEK are new afterwards, every key file is under the new KEK, and the log is whole."""
    records, first = Records(own_daemon), own_daemon.root().hex()
    slot_id = added(own_daemon)
    before = keys_in(own_daemon.data_dir, bytes.fromhex(SPARE))
    answer = remove(own_daemon, slot_id)
    assert (answer.status, answer.body["state"]) == (200, "revoking")
    status_once(own_daemon, lambda found: [kek["state"] for kek in found["keks"]] == ["retired", "active"])
    own_daemon.wait_for_event("root_removed")
    assert [root["slot_id"] for root in listed(own_daemon)] == ["s1"]
    after = keys_in(own_daemon.data_dir, bytes.fromhex(first))
    assert after["keyring key"] != before["keyring key"]
    assert {"audit key 2", "KEK 2"} <= after.keys() - before.keys()
    assert status(own_daemon)["keys"]["by_kek_version"] == {"2": 5}
    assert status(own_daemon)["audit"]["audit_key_version"] == 2
    assert records.open()
    begun, _, removed = own_daemon.events("rotate_kek", "rotate_kek_done", "root_removed")
    assert (begun["actor"], begun["detail"]) == ("minikms", "begun: a root key was removed")
    assert removed["facts"]["fingerprints"] == fingerprint(SPARE)
    restart(own_daemon)
    assert records.open()
    own_daemon.stop()
    assert "rotated away on" in refusal(own_daemon, SPARE)


def test_nobody_opens_later_files_with_a_removed_root_and_old_files(own_daemon: LiveDaemon) -> None:
    """An independent decryptor, which checks nothing but tries everything: each slot, each KEK, each key file."""
    Records(own_daemon)
    slot_id = added(own_daemon)
    old = (own_daemon.data_dir / "keyring.json").read_bytes()
    body, _, _ = decryptor.body_of(old)
    leaked = decryptor.open_slot(body, body["slots"][1], bytes.fromhex(SPARE)).keyring_key
    old_keks = decryptor.keks_of(old, leaked)
    files = key_files(own_daemon)
    assert decryptor.is_authentic(old, leaked)
    assert [len(decryptor.open_dek(file, old_keks)) for file in files] == [32] * 5
    assert remove(own_daemon, slot_id).status == 200
    own_daemon.wait_for_event("root_removed")
    new_key(own_daemon, "later")
    later = (own_daemon.data_dir / "keyring.json").read_bytes()
    body, _, _ = decryptor.body_of(later)
    for slot in body["slots"]:
        with pytest.raises(decryptor.NotOpenedError):
            decryptor.open_slot(body, slot, bytes.fromhex(SPARE))
    assert not decryptor.is_authentic(later, leaked)
    assert decryptor.keks_of(later, leaked) == {}
    assert len(key_files(own_daemon)) == 6
    for file in key_files(own_daemon):
        with pytest.raises(decryptor.NotOpenedError):
            decryptor.open_dek(file, old_keks)


def key_files(daemon: LiveDaemon) -> list[bytes]:
    return [path.read_bytes() for path in sorted((daemon.data_dir / "kms-deks").glob("*.json"))]


def test_a_removed_root_is_revoking_until_every_key_file_was_rewrapped(own_daemon: LiveDaemon) -> None:
    """One file can't be read during the rotation, and can later. It is under the former KEK, which the root opens."""
    key_id = new_key(own_daemon)
    path = own_daemon.data_dir / "kms-deks" / f"{key_id}.json"
    slot_id = added(own_daemon)
    content = path.read_bytes()
    path.write_bytes(b"damaged")
    removed = remove(own_daemon, slot_id)
    assert removed.status == 200
    own_daemon.wait_for_event("rotate_kek_done")
    found = status_once(own_daemon, lambda found: any("1 keys can't be read" in text for text in found["warnings"]))
    assert list(found["keys"]["unreadable_files"]) == [key_id]
    assert remove(own_daemon, slot_id) == removed, "a repeated removal changes nothing"
    assert status(own_daemon)["audit"]["audit_key_version"] == 2
    restart(own_daemon)
    status_once(own_daemon, lambda found: any("1 keys can't be read" in text for text in found["warnings"]))
    assert [root["state"] for root in listed(own_daemon)] == ["active", "revoking"]
    assert not own_daemon.events("root_removed")
    path.write_bytes(content)
    own_daemon.wait_for_event("root_removed")
    assert [root["state"] for root in listed(own_daemon)] == ["active"]
    assert b'"kek_version":2,' in path.read_bytes()
    assert len(own_daemon.events("rotate_kek_done")) == 1, "that takes no further rotation"


def test_root_keys_are_removed_and_replaced_at_a_pace(own_daemon: LiveDaemon) -> None:
    """Each time takes an audit key for good."""
    for number in range(root_slots.REMOVALS_HOUR_MAX - 1):
        slot_id = added(own_daemon, root=f"{number:064x}")
        assert remove(own_daemon, slot_id).status == 200
        status_once(own_daemon, no_rotation)
    slot_id = added(own_daemon)
    refused = remove(own_daemon, slot_id)
    assert (refused.code, "in the last hour" in refused.body["error"]) == ("conflict", True)
    refused = rotate(own_daemon, OTHER)
    assert (refused.code, "in the last hour" in refused.body["error"]) == ("conflict", True)
    assert rotate(own_daemon).status == 200


def test_the_last_root_stays(own_daemon: LiveDaemon) -> None:
    assert remove(own_daemon, "s1").code == "last_root"
    slot_id = added(own_daemon)
    assert remove(own_daemon, slot_id).status == 200
    assert remove(own_daemon, "s1").code == "last_root"
    assert remove(own_daemon, "s404").status == 404


async def test_a_root_is_removed_only_if_another_was_tested_recently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test, a start and the adding count for 90 days."""
    async with opened_vault(tmp_path / "d") as one:
        table = VerbTable(SilentAudit())
        keks = one.kek_verbs(table)
        slot_id = one.slot.slot_id
        verbs = RootVerbs(keks=keks, in_use_slot_id=slot_id)
        event = Event(type="t", actor="t")
        spare = one.slot_of(bytes.fromhex(SPARE))
        added = await verbs.add_root(AddGivenRoot("file", "", root=spare), event, permitted)
        later = now_ns() + 91 * 24 * 3600 * 1_000_000_000
        with monkeypatch.context() as patched:
            patched.setattr(service_roots, "now_ns", lambda: later)
            with pytest.raises(NotTestedError, match="last 90 days"):
                await verbs.remove_root(api.SlotRequest(slot_id), event, permitted)
            patched.setattr(service_roots, "now_rfc3339", lambda: rfc3339(later))
            await verbs.test_root(GivenRootTest("", added.slot_id, root=spare), event, permitted)
            removed = await verbs.remove_root(api.SlotRequest(slot_id), event, permitted)
        assert removed.state == "revoking"
        await keks.stop()


def test_the_root_of_this_run_can_be_removed_once_another_was_added(own_daemon: LiveDaemon) -> None:
    records, first = Records(own_daemon), own_daemon.root().hex()
    added(own_daemon)
    assert remove(own_daemon, "s1").status == 200
    assert rotate(own_daemon, OTHER).code == "wrong_slot"
    status_once(own_daemon, no_rotation)
    assert records.open()
    own_daemon.stop()
    assert "rotated away on" in refusal(own_daemon, first)
    own_daemon.root_file.write_text(SPARE)
    own_daemon.start()
    assert records.open()


def test_a_removal_during_a_rotation_is_followed_by_another(own_daemon: LiveDaemon) -> None:
    records = Records(own_daemon, 20)
    slot_id = added(own_daemon)
    rotate(own_daemon, wait=False)
    assert remove(own_daemon, slot_id).status == 200
    own_daemon.wait_for_event("root_removed")
    active = [version for version, state in keks(own_daemon).items() if state == "active"]
    assert status(own_daemon)["keys"]["by_kek_version"] == {str(active[0]): 20}
    assert records.open()


def test_other_slots_stay_when_the_root_of_this_run_is_replaced(own_daemon: LiveDaemon) -> None:
    records = Records(own_daemon)
    spare = added(own_daemon)
    assert rotate(own_daemon, OTHER).status == 200
    assert [root.get("replaces", "") for root in listed(own_daemon)] == ["", "", "s1"]
    restart(own_daemon, OTHER)
    own_daemon.wait_for_event("root_removed")
    assert [root["fingerprint"] for root in listed(own_daemon)] == [fingerprint(SPARE), fingerprint(OTHER)]
    restart(own_daemon, SPARE)
    assert records.open()
    assert [root["slot_id"] for root in listed(own_daemon) if root["in_use"]] == [spare]


def test_a_root_of_another_provider_is_not_replaced_by_a_request(own_daemon: LiveDaemon) -> None:
    added(own_daemon, provider="token")
    restart(own_daemon, SPARE)
    answer = rotate(own_daemon, OTHER)
    assert (answer.status, answer.code) == (409, "wrong_slot")
    assert "POST /roots" in answer.body["error"]
    assert rotate(own_daemon).status == 200  # the KEK alone
