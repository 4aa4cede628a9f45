"""KEK and root key through a real daemon: who may rotate what when, and which root key opens what afterwards."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms_daemon.service import keks as keks_module
from minikms_daemon.service.base import VerbTable
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import SilentAudit, opened_vault
from tests.minikms_daemon.service.asking import Answer, ask, b64, encrypted, new_key, post, status, status_once

NEW = bytes(range(100, 132)).hex()
OTHER = bytes(range(50, 82)).hex()


def rotate(daemon: LiveDaemon, root: str | None = None, **others: object) -> Answer:
    return post(daemon, "/rotate_kek", others if root is None else {"new_kek_hex": root, **others})


def restart(daemon: LiveDaemon, root: str | None = None) -> None:
    daemon.stop()
    if root is not None:
        daemon.root_file.write_text(root + "\n")
    daemon.start()


def refusal(daemon: LiveDaemon, root: str) -> str:
    """What a start under this root key says; the daemon must be stopped."""
    daemon.root_file.write_text(root + "\n")
    with contextlib.suppress(AssertionError):
        daemon.start()
        pytest.fail("it started")
    return daemon.log.read_text().splitlines()[-1]


def no_rotation(found: dict[str, Any]) -> bool:
    return found["rotation"] is None


def keks(daemon: LiveDaemon) -> dict[int, str]:
    return {kek["version"]: kek["state"] for kek in status(daemon)["keks"]}


class Records:
    """One record under each of some keys, and whether they all open."""

    def __init__(self, daemon: LiveDaemon, count: int = 5) -> None:
        self.daemon = daemon
        self.key_ids = [new_key(daemon, f"t{number}") for number in range(count)]
        self.sealed = {key_id: encrypted(daemon, key_id, key_id.encode(), aad=b64(b"a")) for key_id in self.key_ids}

    def open(self) -> bool:
        items = [{"key_id": key_id, "ciphertext": sealed, "aad": b64(b"a")} for key_id, sealed in self.sealed.items()]
        answer = post(self.daemon, "/decrypt_batch", {"items": items})
        return bool(answer.body == {"items": [{"plaintext": b64(key_id.encode())} for key_id in self.key_ids]})

    def samples(self, **changes: str) -> list[dict[str, str]]:
        return [
            {"key_id": key_id, "ciphertext": sealed, "aad": b64(b"a")} | changes
            for key_id, sealed in self.sealed.items()
        ]


# --- both forms ---------------------------------------------------------------------------------------------------


def test_without_a_key_in_the_request_the_kek_rotates_and_the_root_stays(own_daemon: LiveDaemon) -> None:
    records = Records(own_daemon)
    before = status(own_daemon)
    assert rotate(own_daemon) == (200, {"status": "ok", "kek_version": 2, "rewrapped": 5})
    after = status(own_daemon)
    assert keks(own_daemon) == {1: "retired", 2: "active"}
    assert after["root"] == before["root"]
    assert after["epoch"] > before["epoch"]
    assert after["keys"]["by_kek_version"] == {"2": 5}
    assert records.open()
    restart(own_daemon)
    assert records.open()


def test_a_key_in_the_request_is_the_root_key_from_its_first_start_on(own_daemon: LiveDaemon) -> None:
    records, old = Records(own_daemon), own_daemon.root().hex()
    assert rotate(own_daemon, NEW).status == 200
    told = status(own_daemon)
    assert len(told["root"]["slots"]) == 2
    assert any("more than one root key opens the keyring" in warning for warning in told["warnings"])
    assert records.open()
    restart(own_daemon, old)  # the operator has not yet put the new key in place: it must still open
    assert records.open()
    assert len(status(own_daemon)["root"]["slots"]) == 2
    restart(own_daemon, NEW)
    assert records.open()
    assert status(own_daemon)["root"]["slots"] == [told["root"]["slots"][1]]
    assert own_daemon.events("root_keys_dropped")[-1]["facts"]["fingerprints"] == told["root"]["slots"][0]


def test_before_it_is_promoted_the_new_root_key_opens_too(tmp_path: Path) -> None:
    """Killed right after the beginning, with nothing rewrapped: the start under the new key finishes the rotation."""
    with LiveDaemon(tmp_path) as daemon:
        records = Records(daemon)
        kill_at_first_backup(daemon, NEW)
        daemon.root_file.write_text(NEW)
        daemon.start()
        told = status_once(daemon, no_rotation)
        *former, newest = (kek["state"] for kek in told["keks"])  # one or two: dropping the old root key rotates again
        assert (set(former), newest) == ({"retired"}, "active")
        assert records.open()


def kill_at_first_backup(daemon: LiveDaemon, root: str) -> None:
    """A rotation to `root` that ends with the process when the first backup would be written."""
    with at_each_call(daemon, "mkdir,mkdirat", "signal=KILL:when=1"):
        with contextlib.suppress(OSError):
            rotate(daemon, root)
        daemon.process.wait(60)


@contextlib.contextmanager
def at_each_call(daemon: LiveDaemon, calls: str, action: str) -> Iterator[None]:
    """Restart the daemon under strace, which does `action` at each of these system calls.

    A rotation makes the directory of its backups with `mkdir`, and overwrites each key file with `pwrite64`.

    An ordinary user can't attach strace to the daemon, which is not dumpable, but can start it as strace's child.
    """
    strace = needs.program("strace")
    daemon.stop()
    daemon.start(strace, "-D", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:{action}")
    status_lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    [tracer] = [int(line.split()[1]) for line in status_lines if line.startswith("TracerPid:")]
    assert tracer != 0
    try:
        yield
    finally:
        if daemon.process.poll() is None:
            os.kill(tracer, signal.SIGINT)  # it detaches, and the daemon goes on


def test_without_its_slot_the_old_root_key_is_refused(own_daemon: LiveDaemon) -> None:
    """The error says when it was replaced, and which root key is expected."""
    old = own_daemon.root().hex()
    rotate(own_daemon, NEW)
    restart(own_daemon, NEW)
    [expected] = status(own_daemon)["root"]["slots"]
    before = own_daemon.events("root_keys_dropped")[-1]
    own_daemon.stop()
    text = refusal(own_daemon, old)
    assert f"was removed or rotated away on {time.strftime('%Y-%m-%dT', time.gmtime(before['ts'] / 1e9))}" in text
    assert expected in text
    assert before["facts"]["fingerprints"] in text
    assert old not in text


# --- what is asked twice, or meanwhile ------------------------------------------------------------------------------


def test_the_same_root_key_again_is_answered_as_done_and_rotates_nothing(own_daemon: LiveDaemon) -> None:
    records = Records(own_daemon)
    first = rotate(own_daemon, NEW)
    again = rotate(own_daemon, NEW.upper())
    assert first.status == again.status == 200
    assert again.body["kek_version"] == 2
    assert keks(own_daemon) == {1: "retired", 2: "active"}
    lines = [line["detail"] for line in own_daemon.events("rotate_kek")]
    assert lines == ["begun", "running or done already"]
    assert records.open()
    restart(own_daemon, NEW)
    assert rotate(own_daemon, NEW).body["kek_version"] == 3  # after the removal of the old root key
    assert keks(own_daemon) == {1: "retired", 2: "retired", 3: "active"}


def test_a_second_rotation_is_refused_and_a_repeated_request_joins(own_daemon: LiveDaemon) -> None:
    """Creating, encrypting and decrypting go on meanwhile, and /status reports the progress."""
    records = Records(own_daemon, 12)
    with at_each_call(own_daemon, "pwrite64", "delay_enter=400ms"):  # 5 s, for what takes a tenth of one when idle
        assert rotate(own_daemon, NEW, wait=False) == (202, {"status": "running", "kek_version": 2, "rewrapped": 0})
        told = status(own_daemon)["rotation"]
        assert (told["from_version"], told["to_version"], told["new_root"]) == (1, 2, True)
        assert told["rewrapped"] <= 12
        for other in ({"new_kek_hex": OTHER}, {}):
            answer = post(own_daemon, "/rotate_kek", other)
            assert (answer.status, answer.code) == (409, "conflict")
        assert post(own_daemon, "/kek/prune", {}).code == "conflict"
        assert rotate(own_daemon, NEW, wait=False).status == 202
        assert records.open()
        assert status(own_daemon)["rotation"] is not None, "it was over before all of this was asked"
        meanwhile = new_key(own_daemon, "meanwhile")
        encrypted(own_daemon, meanwhile)
        assert ask(own_daemon, "GET", f"/keys/{meanwhile}").body["kek_version"] == 2
    assert rotate(own_daemon, NEW).body == {"status": "ok", "kek_version": 2, "rewrapped": 12}
    status_once(own_daemon, no_rotation)
    assert keks(own_daemon) == {1: "retired", 2: "active"}
    assert records.open()


def test_a_stop_does_not_wait_for_a_rotation_the_next_start_finishes(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        records = Records(daemon, 20)
        answers: list[Answer] = []
        with at_each_call(daemon, "pwrite64", "delay_enter=150ms"):
            waiting = threading.Thread(target=lambda: answers.append(rotate(daemon)))
            waiting.start()
            while status(daemon)["rotation"] is None:
                time.sleep(0.01)
            daemon.process.terminate()
            waiting.join(60)
        assert daemon.process.wait(60) == 0
        assert [(answer.status, answer.code) for answer in answers] == [(503, "interrupted")]
        daemon.start()
        status_once(daemon, no_rotation)
        assert keks(daemon) == {1: "retired", 2: "active"}
        assert records.open()
        done = daemon.events("rotate_kek_done")
        assert len(done) == 1
        assert done[0]["facts"]["kek_version"] == 2


# --- what is asked wrongly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"new_kek_hex":""}',
        b'{"new_kek_hex":"%b"}' % NEW[:-1].encode(),
        b'{"new_kek_hex":"%b0"}' % NEW.encode(),
        b'{"new_kek_hex":"%bzz"}' % NEW[:-2].encode(),
        b'{"new_kek_hex":null}',
        b'{"new_kek_hex":5}',
        b'{"new_kek_hex":["%b"]}' % NEW.encode(),
        b'{"new_kek_hex":"%b","new_kek_hex":"%b"}' % (NEW.encode(), NEW.encode()),
        b'{"new_kek_hex":"%b","new_kek_hex":"%b"}' % (NEW.encode(), OTHER.encode()),
        b'{"new_kek":"%b"}' % NEW.encode(),
        b'{"new_kek_hex\\u0000":"%b"}' % NEW.encode(),
        b'{"\\u006eew_kek_hex":"%b"}' % NEW.encode(),
        b'{"wait":"no"}',
        b'{"priority":"urgent"}',
        b'{"priority":null}',
        b'{"wait":true,"wait":true}',
        b'{"verify":{}}',
        b'{"verify":[{"key_id":"x","ciphertext":"","new_kek_hex":"%b"}]}' % NEW.encode(),
        b"[]",
        b"",
    ],
)
def test_a_malformed_rotation_request_changes_nothing_and_leaves_no_key(daemon: LiveDaemon, body: bytes) -> None:
    before = status(daemon)
    answer = post(daemon, "/rotate_kek", body)
    assert (answer.status, answer.code) == (400, "invalid_request"), answer
    after = status(daemon)
    assert (after["keks"], after["root"], after["epoch"]) == (before["keks"], before["root"], before["epoch"])
    said = json.dumps(answer.body) + daemon.log.read_text()
    said += (daemon.data_dir / "minikms-audit.log").read_text()
    assert NEW not in said and NEW[:60] not in said


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_opened_before_and_after(own_daemon: LiveDaemon) -> None:
    records = Records(own_daemon)
    assert rotate(own_daemon, verify=records.samples()).status == 200
    for changes, code in (
        ({"aad": b64(b"b")}, "decryption_failed"),
        ({"ciphertext": b64(bytes(40))}, "decryption_failed"),
        ({"key_id": "k_" + "0" * 26}, "key_not_found"),
        ({"key_id": "x"}, "invalid_request"),
        ({"ciphertext": "x"}, "invalid_request"),
    ):
        assert rotate(own_daemon, verify=records.samples(**changes)).code == code
    assert rotate(own_daemon, verify=records.samples() * 13).code == "too_many"
    assert keks(own_daemon) == {1: "retired", 2: "active"}
    assert [line["outcome"] for line in own_daemon.events("rotate_kek")] == ["ok"] + ["decryption_failed"] * 2 + [
        "key_not_found"
    ] + ["invalid_request"] * 2 + ["too_many"]


def test_a_sample_whose_aad_looks_like_a_key_is_taken_as_it_is(own_daemon: LiveDaemon) -> None:
    """Forty-five zero bytes and more are sixty hexadecimal digits in base64, but no key under another name."""
    key_id, aad = new_key(own_daemon), b64(bytes(48))
    sample = {"key_id": key_id, "ciphertext": encrypted(own_daemon, key_id, aad=aad), "aad": aad}
    assert rotate(own_daemon, NEW, verify=[sample]).status == 200


# --- the key file ---------------------------------------------------------------------------------------------------


def test_on_request_the_key_file_is_rewritten_and_the_old_root_removed(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file", "--rewrite-master-key-file") as daemon:
        records, old = Records(daemon), daemon.root().hex()
        assert rotate(daemon, NEW).status == 200
        assert daemon.root_file.read_text() == NEW + "\n"
        assert daemon.root_file.stat().st_mode & 0o777 == 0o600
        deadline = time.monotonic() + 60
        while len(status(daemon)["root"]["slots"]) > 1 or not daemon.events("root_removed"):
            assert time.monotonic() < deadline
        told = status(daemon)
        assert keks(daemon) == {1: "retired", 2: "retired", 3: "active"}
        assert told["root"]["fingerprint"] == told["root"]["slots"][0]
        assert [root["in_use"] for root in ask(daemon, "GET", "/roots").body["roots"]] == [True]
        assert not any("root key" in warning for warning in told["warnings"])
        assert [path.name for path in tmp_path.iterdir() if "key" in path.name] == ["data.master-key"]
        restart(daemon)
        assert records.open()
        daemon.stop()
        assert "rotated away on" in refusal(daemon, old)


def test_a_key_file_that_stays_unchanged_is_reported_and_both_roots_open(tmp_path: Path) -> None:
    """Its directory is another user's, and a daemon of root's has given up the right to write there all the same."""
    needs.root()
    keys = tmp_path / "keys"
    keys.mkdir(0o755)
    (keys / "key").touch(0o600)
    (tmp_path / "data.master-key").symlink_to(keys / "key")
    os.chown(keys, 45_679, 45_679)
    with LiveDaemon(tmp_path, "file", "--rewrite-master-key-file") as daemon:
        records, old = Records(daemon), daemon.root().hex()
        assert rotate(daemon, NEW).status == 200
        told = status_once(daemon, no_rotation)
        assert len(told["root"]["slots"]) == 2
        assert any("could not be rewritten" in warning for warning in told["warnings"])
        assert daemon.root().hex() == old
        assert [path.name for path in keys.iterdir()] == ["key"]
        restart(daemon)
        assert len(status(daemon)["root"]["slots"]) == 2
        restart(daemon, NEW)  # by hand
        assert len(status(daemon)["root"]["slots"]) == 1
        assert records.open()


# --- backups and old KEKs -------------------------------------------------------------------------------------------


async def test_a_rotation_that_a_removal_asks_for_is_shown_before_it_begins(tmp_path: Path) -> None:
    """From the moment at which the keyring is without the root key, whoever polls `/status` finds a rotation."""
    async with opened_vault(tmp_path / "d") as one:
        keks = one.kek_verbs(VerbTable(SilentAudit()))
        await one.rotate(one.slot_of(os.urandom(32)))
        assert keks.progress() is None
        (keks.proved_slot_id,) = [slot.slot_id for slot in one.vault.keyring.body.slots if slot.replaces]
        dropping = asyncio.ensure_future(keks.drop_replaced_roots())
        shown: list[tuple[int, int]] = []
        while not dropping.done() or one.vault.keyring.body.revoking:
            await asyncio.sleep(0)
            if one.vault.keyring.body.slot(one.slot.slot_id) is None and one.vault.keyring.body.revoking:
                progress = keks.progress()
                assert progress is not None
                shown.append((progress["from_version"], progress["to_version"]))
        assert set(shown) == {(2, 3)}
        await keks.stop()
        assert keks.progress() is None


async def test_the_reason_why_a_due_rotation_cannot_begin_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a request began the rotation: the next one that is due would not be shown otherwise."""
    async with opened_vault(tmp_path / "d") as one:
        keks = one.kek_verbs(VerbTable(SilentAudit()))
        await one.rotate(one.slot_of(os.urandom(32)))
        (keks.proved_slot_id,) = [slot.slot_id for slot in one.vault.keyring.body.slots if slot.replaces]
        begin = one.rotation.begin

        async def refused(root: object) -> None:
            await begin(None)  # a request
            raise StorageUnavailableError("the disk is full")

        monkeypatch.setattr(keks_module, "REVOCATION_RETRY_SECONDS", 0)
        monkeypatch.setattr(one.rotation, "begin", refused)
        await keks.drop_replaced_roots()
        while (active := one.vault.keyring.body.kek_in_state("active")) is None or active.version < 3:
            await asyncio.sleep(0)
        assert keks.revocation_error == ""
        await keks.stop()
