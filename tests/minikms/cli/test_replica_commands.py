"""`minikms replica`: what it shows of the hosts, what it asks, and the files that pass from host to host."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api.errors import ConflictError, StandbyError
from minikms.cli import console, replica
from minikms.cli.console import explained
from minikms.commands.usage import CommandError
from minikms.crypto.slots import SEALED_BYTES, Newcomer
from minikms.keys import members
from minikms.keys.dek import bytes_to_key_id
from tests import needs
from tests.harness import forked
from tests.harness.vaults import key_file

REQUEST = members.request(Newcomer("kr_1", "s5", "0" * 16, bytes(32), bytes(1216), bytes(SEALED_BYTES)), "b", "file")


def report(member_id: str, name: str, mode: api.Mode, number: int, **others: Any) -> api.MemberReport:
    fields: dict[str, Any] = {"term": 3, "version": "1.0", "policy": "p", "pin": "", "why": "", "seen_seconds": 1.2}
    fields |= others
    return api.MemberReport(member_id=member_id, name=name, mode=mode, number=number, **fields)


SERVING = report("m1", "a", "serving", 1200)
STATUS = api.ReplicaStatusAnswer(
    enabled=True, member_id="m1", mode="serving", serving="m1", term=3, number=1200, lease_seconds=9.5,
    heard_seconds=0.4, members=[SERVING, report("m5", "b", "following", 1190, policy="q", pin="x", why="slow")],
)  # fmt: skip


class Daemon:
    """Answers in the place of a client, and keeps what it was asked."""

    def __init__(self, *states: api.ReplicaStatusAnswer) -> None:
        self.states = list(states)
        self.asked: list[Any] = []
        self.conflicts = 0

    def replica_status(self) -> api.ReplicaStatusAnswer:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def promote_replica(self, *, replace_database: bool) -> api.ReplicaStatusAnswer:
        self.asked.append(replace_database)
        if len(self.asked) <= self.conflicts:
            raise ConflictError("this host serves")
        return self.replica_status()

    def add_replica(self, request: api.AddReplicaRequest) -> api.ReplicaAnswer:
        self.asked.append(request)
        return api.ReplicaAnswer(request.member_id, request.name, request.slot_id, request.fingerprint)

    def remove_replica(self, member_id: str) -> api.ReplicaAnswer:
        self.asked.append(member_id)
        return api.ReplicaAnswer(member_id, "b", "s5", "" if member_id == "m9" else "0" * 16)

    def invite_replica(self) -> api.ReplicaInvitation:
        return api.ReplicaInvitation(members.INVITATION_FORMAT, "kr_1", "m5", "s5", b"public", 0)


Answers = Callable[..., Daemon]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    def use(*states: api.ReplicaStatusAnswer) -> Daemon:
        daemon = Daemon(*states or [STATUS])

        @contextmanager
        def client(*_: object) -> Iterator[Daemon]:
            yield daemon

        monkeypatch.setattr(console, "daemon_client", client)
        return daemon

    return use


def state(mode: api.Mode, **changes: Any) -> api.ReplicaStatusAnswer:
    return msgspec.structs.replace(STATUS, mode=mode, **changes)


def test_the_list_shows_lag_and_differences(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers()
    replica.list_hosts()
    title, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title[:6] == ["host", "name", "mode", "changes", "behind", "seen"]
    assert first == ["m1", "a", "serving", "1200", "0", "1", "s", "ago", "1.0"]
    assert " ".join(second) == "m5 b following 1190 10 1 s ago 1.0 slow; ANOTHER POLICY; another pin file"


def test_the_mode_of_a_host_that_reports_no_more_is_silent(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, other = STATUS.members
    answers(state("following", members=[msgspec.structs.replace(lost, seen_seconds=31.0), other]))
    replica.list_hosts()
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["silent", "following"]


def test_a_host_is_removed_by_its_name_or_id(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = answers()
    with pytest.raises(CommandError, match="--yes"):
        replica.remove("b")
    replica.remove("b", yes=True)
    replica.remove("m5", yes=True)
    assert "Its root key 0000000000000000 opens no later keyring" in capsys.readouterr().out
    replica.remove("m9", yes=True)  # which has never reported, and whose root key was removed before
    assert "look for a later one" in capsys.readouterr().out
    assert daemon.asked == ["m5", "m5", "m9"]


def test_promote_waits_until_this_host_serves(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers(state("following"), state("following"), state("taking_over"), state("serving"))
    assert replica.promote() == 0
    assert capsys.readouterr().out == "This host, m1, serves in term 3.\n"


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([state("following", why="it is behind")], "its mode is following: it is behind"),
        ([state("following"), state("refused", why="rolled back")], "its mode is refused: rolled back"),
        ([state("sealed")], "its mode is sealed"),
    ],
)
def test_promote_says_when_this_host_does_not_serve(
    answers: Answers, capsys: pytest.CaptureFixture[str], states: list[api.ReplicaStatusAnswer], said: str
) -> None:
    answers(*states)
    assert replica.promote(wait=0.1 if len(states) == 1 else 60) == 1
    assert said in capsys.readouterr().err


def test_who_has_refused_an_older_database_fills_an_empty_one(answers: Answers) -> None:
    answers(state("refused", why="rolled back"), state("refused", why="rolled back"), state("serving"))
    assert replica.promote(replace_database=True, yes=True) == 0


def test_a_promotion_waits_for_the_end_of_the_lease_of_this_host(answers: Answers) -> None:
    daemon = answers(state("following"), state("serving"))
    daemon.conflicts = 2
    assert replica.promote(replace_database=True, yes=True) == 0 and len(daemon.asked) == 3
    daemon.conflicts = 9
    with pytest.raises(ConflictError):
        replica.promote(replace_database=True, yes=True, wait=0)
    daemon.asked.clear()
    with pytest.raises(ConflictError):  # a refusal that no wait ends, as that of the only host
        replica.promote()
    assert daemon.asked == [False]


def key_id(number: int) -> str:
    return bytes_to_key_id(number.to_bytes(16, "big"))


def evidence(place: Path, name: str, number: int, keys: dict[int, str], destroyed: Sequence[int] = ()) -> Path:
    """A file as a host writes it, without a name as for the database."""
    path = place / f"{name or 'database'}.json"
    stones = [one.to_bytes(16, "big").hex() for one in destroyed]
    contents = {key_id(one): content for one, content in keys.items()}
    path.write_bytes(msgspec.json.encode(api.ReplicaEvidence("kr_1", name, 3, number, contents, stones)))
    return path


def test_the_evidence_names_who_lacks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not who has most changes; the file of a destroyed key is lacked by nobody."""
    files = (
        evidence(tmp_path, "a", 14, {1: "x", 2: "x"}, [3]),
        evidence(tmp_path, "c", 20, {1: "x", 2: replica.DAMAGED, 3: "x"}),
        evidence(tmp_path, "", 20, {1: "y", 3: "x"}),
    )
    assert replica.evidence(*files, json=True) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["complete"] == ["a"]
    c, database, a = (list(one.values()) for one in page["holders"])
    assert list(page["holders"][0])[:3] == ["name", "term", "number"]
    assert (a[0], *a[5:]) == ("a", [], [], [])
    assert (c[0], *c[5:]) == ("c", [key_id(2)], [key_id(3)], [key_id(2)])
    assert (database[0], *database[5:]) == ("", [key_id(2)], [key_id(3)], [key_id(1)])
    assert replica.evidence(*files) == 0
    shown = capsys.readouterr().out
    assert f"the database lacks the keys {key_id(2)}\n" in shown and shown.endswith("\nlacks nothing: a\n")


def test_the_evidence_of_two_histories_names_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (evidence(tmp_path, "a", 14, {1: "x"}), evidence(tmp_path, "c", 20, {2: "x"}))
    assert replica.evidence(*files) == 1
    assert "each host lacks something that another one has" in capsys.readouterr().out
    files[0].write_text(files[0].read_text().replace("kr_1", "kr_2"))
    with pytest.raises(CommandError, match="different key services"):
        replica.evidence(*files)
    no_tombstone = evidence(tmp_path, "b", 1, {}).read_text().replace('"destroyed":[]', '"destroyed":["zz"]')
    for content in ("{}", no_tombstone):
        files[0].write_text(content)
        with pytest.raises(CommandError, match=r"copy (it|them) again"):
            replica.evidence(*files)


def test_a_database_is_filled_only_after_a_confirmation(answers: Answers) -> None:
    daemon = answers()
    with pytest.raises(CommandError, match="--yes"):
        replica.promote(replace_database=True)
    assert daemon.asked == []
    replica.promote(replace_database=True, yes=True)
    replica.promote()
    assert daemon.asked == [True, False]


@pytest.mark.parametrize(
    ("shown", "works", "said"),
    [
        (STATUS, True, "9.5 s left"),
        (state("following", lease_seconds=0.0), True, "none"),
        (state("following", heard_seconds=60.0), False, "heard 1 min ago"),
        (state("following", heard_seconds=None), False, "NEVER HEARD"),
        (state("refused", why="rolled back"), False, "refused: rolled back"),
        (state("sealed"), False, "sealed"),
        (api.ReplicaStatusAnswer(enabled=False), True, "has one host"),
    ],
)
def test_the_status_says_whether_this_host_works(
    answers: Answers, capsys: pytest.CaptureFixture[str], shown: api.ReplicaStatusAnswer, works: bool, said: str
) -> None:
    answers(shown)
    assert replica.status() == (0 if works else 1)
    assert said in capsys.readouterr().out
    assert replica.status(json=True) == (0 if works else 1)
    assert json.loads(capsys.readouterr().out)["mode"] == shown.mode


def test_a_host_is_added_after_its_fingerprint_was_confirmed(
    answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = answers()
    file = tmp_path / "request.json"
    file.write_bytes(msgspec.json.encode(REQUEST))
    with pytest.raises(CommandError, match="--yes"):
        replica.add(file)
    assert daemon.asked == []
    replica.add(file, yes=True)
    assert daemon.asked == [REQUEST]
    assert "minikms-replicator fetch" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", msgspec.json.encode(REQUEST) + b" " * 20_000])
def test_what_is_no_request_is_refused(answers: Answers, tmp_path: Path, content: bytes) -> None:
    daemon = answers()
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(CommandError, match="is not what `minikms replica` makes"):
        replica.add(tmp_path / "request.json", yes=True)
    assert daemon.asked == []


def test_an_invitation_becomes_a_file_that_is_never_overwritten(answers: Answers, tmp_path: Path) -> None:
    answers()
    file = tmp_path / "invite.json"
    replica.invite(invitation=file)
    text = file.read_text()
    assert json.loads(text)["member_id"] == "m5"
    with pytest.raises(CommandError, match="exists already"):
        replica.invite(invitation=file)
    assert file.read_text() == text


def test_a_command_on_a_standby_says_where_to_run_it() -> None:
    text, status = explained(StandbyError())
    assert (status, "standby" in text, "`minikms replica list` shows which" in text) == (1, True, True)


def run(*words: str | Path) -> tuple[int, str, str]:
    done = forked.run("minikms", *words)
    return done.returncode, done.stdout, done.stderr


def test_a_stopped_host_becomes_the_first_and_leaves(tmp_path: Path) -> None:
    place = ("--data-dir", tmp_path / "d", "--master-key-file", key_file(tmp_path / "d"))
    assert run("init", *place)[0] == 0
    assert run("replica", "init", "--name", "A", *place)[0] == 2
    status, said, _ = run("replica", "init", "--name", "a", *place)
    assert status == 0 and "m1, the first of several" in said and "minikms replica invite" in said
    status, _, error = run("replica", "leave", *place)
    assert status == 2 and "--yes" in error
    status, said, _ = run("doctor", *place)
    assert status == 0 and "this is a of 1 hosts: a (m1)" in said
    status, said, _ = run("replica", "leave", "--yes", "--json", *place)
    assert (status, json.loads(said)["number"]) == (0, 0)
    assert "hosts:" not in run("doctor", *place)[1]


def test_doctor_names_what_is_wrong_with_a_member(tmp_path: Path) -> None:
    place = ("--data-dir", tmp_path / "d", "--master-key-file", key_file(tmp_path / "d"))
    run("init", *place)
    run("replica", "init", "--name", "a", *place)
    mark = tmp_path / "d" / "kms-replica.json"
    good = mark.read_bytes()
    for content, said in (
        (b"{}", "kms-replica.json is damaged"),
        (good.replace(b'"number":0', b'"number":7'), "was altered"),
        (good.replace(b'"m1"', b'"m8"'), "the keyring has no host m8"),
    ):
        mark.write_bytes(content)
        status, told, _ = run("doctor", *place)
        assert status == 1 and said in told, told
    mark.unlink()
    status, told, _ = run("doctor", *place)
    assert status == 1 and "kms-replica.json is missing" in told


def test_a_restored_archive_of_a_member_is_that_of_one_host(tmp_path: Path) -> None:
    place = ("--data-dir", tmp_path / "d", "--master-key-file", key_file(tmp_path / "d"))
    run("init", *place)
    run("replica", "init", "--name", "a", *place)
    archive, target = tmp_path / "archive", tmp_path / "restored"
    assert run("backup", "create", archive, *place)[0] == 0
    status, _, error = run("backup", "restore", archive, "--data-dir", target, *place[2:], "--yes")
    assert status == 0, error
    assert not (target / "kms-replica.json").exists()
    assert "hosts:" not in run("doctor", "--data-dir", target, *place[2:])[1]
    assert run("replica", "init", "--name", "a", "--data-dir", target, *place[2:])[0] == 0


def test_root_names_the_request_of_a_host_in_the_pin_file(tmp_path: Path) -> None:
    needs.root()
    data, pin = tmp_path / "d", tmp_path / "pins" / "pin"
    pin.parent.mkdir(0o755)
    place = ("--data-dir", data, "--master-key-file", key_file(data))
    run("init", *place)
    pins = ("--pin", pin, "--data-dir", data)
    file = tmp_path / "request.json"
    keyring_id = json.loads(run("pin", "add", f"file:{key_file(data)}", *pins, "--json")[1])["keyring_id"]
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(REQUEST, keyring_id=keyring_id)))
    status, said, _ = run("pin", "add-host", file, *pins, "--yes")
    assert status == 0 and "names the request of b" in said
    request = replica.read_request(file)
    assert json.loads(pin.read_text())["pins"][request.fingerprint] == members.newcomer(request).digest
    own = next(name for name in json.loads(pin.read_text())["pins"] if name != request.fingerprint)
    for changed in ({"keyring_id": "kr_2"}, {"fingerprint": own}):  # the pin of a root key is never overwritten
        before = pin.read_text()
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(request, **changed)))
        assert run("pin", "add-host", file, *pins, "--yes")[0] in (1, 2)
        assert pin.read_text() == before
