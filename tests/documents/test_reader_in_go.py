"""`examples/reader-go`, made from docs/spec/ alone, reads what real programs made, and refuses it altered."""

import json
import os
import re
import subprocess
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.minikms.audit.logmaker import Key
from tests.minikms_auditor.rig import Rig

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "reader-go"
CODE_LINES_MAX = 600
GO_VERSION_MIN = (1, 24)
BUILD_S_MAX = 400
SIG_BYTES = 47
"""SIG at the end of a line, which only the next line or the tree covers."""
LONG = os.urandom(3 * 65536 + 7)


class Data(NamedTuple):
    """What the programs made, below `base`. log: the directory of the audit log."""

    base: Path
    archive: Path
    shares: Path
    log: Path
    public_key: str
    key_ids: list[str]
    record: bytes
    streams: dict[str, bytes]
    receipt: Path
    checkpoint: Path
    note_keys: list[str]


Reader = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    go = needs.program("go")
    said = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    if version < GO_VERSION_MIN:
        pytest.skip("needs Go 1.24 or newer, whose standard library has ML-KEM")
    base = tmp_path_factory.mktemp("reader")
    environ = os.environ | {"GOFLAGS": "-mod=readonly", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "on"}
    if not os.access(os.path.expanduser("~"), os.W_OK):
        environ["GOCACHE"] = str(base / "cache")
    command = [go, "build", "-o", str(base / "reader"), "."]
    built = subprocess.run(
        command, cwd=SOURCE, env=environ, capture_output=True, text=True, timeout=BUILD_S_MAX, check=False
    )
    assert built.returncode == 0, built.stderr

    def run(*words: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [str(base / "reader"), *map(str, words)]
        return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)

    return run


def minikms(*words: str | Path) -> str:
    done = forked.run("minikms", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    base = tmp_path_factory.mktemp("data")
    places: list[str | Path] = ["--data-dir", base / "data", "--master-key-file", base / "data.master-key"]
    minikms("init", *places, "--recovery-shares", "2/3", "--shares-dir", base / "shares")
    share_files = sorted((base / "shares").iterdir())
    shares = base / "two-shares"
    shares.write_text(share_files[0].read_text() + share_files[2].read_text())
    shares.chmod(0o600)
    root = bytes.fromhex((base / "data.master-key").read_text())
    streams = {}
    with LiveDaemon(base, root=root) as daemon, daemon.client() as kms:
        ids = [kms.create_dek_for_thread(f"t-{number}").key_id for number in range(3)]
        kms.rotate_kek()
        record = kms.encrypt(ids[0], b"a record", aad=b"its place")
        for name, content in (("empty", b""), ("full", LONG[:65536]), ("long", LONG)):
            (base / name).write_bytes(content)
            minikms("encrypt", base / name, "--socket", daemon.socket)
            streams[name] = (base / f"{name}.kms").read_bytes()
        minikms("backup", "create", base / "archive", *places)
        gone = kms.create_dek_for_thread("t-gone").key_id
        kms.retire_key(gone)
        kms.destroy_key(gone)
        daemon.stop()
    public_key = json.loads((base / "data" / "keyring.json").read_bytes())["body"]["audit_keys"][0]["public_key"]
    (base / "auditor").mkdir()
    with Rig(base / "auditor", witnesses=2) as rig:
        rig.log_dir = rig.daemon.directory = base / "data"
        first = Key(1)
        first.public_key = b64decode(public_key)
        rig.public_keys = [first]
        status = rig.steps()
        assert not status.alarm, status
        note_keys = [rig.vkey(), "2", *(rig.witness(f"witness.example/w{number}")[1] for number in (1, 2))]
    tree = rig.state_dir / "tree"
    (base / "receipt").write_text(minikms("keys", "receipt", gone, "--data-dir", base / "data", "--tiles", tree))
    return Data(
        base, base / "archive", shares, base / "data", public_key, ids, record, streams, base / "receipt",
        tree / "checkpoint", note_keys,
    )  # fmt: skip


def altered(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def places_in(content: bytes, count: int = 60) -> list[int]:
    return sorted({*range(0, len(content), max(1, len(content) // count)), len(content) - 1})


def is_refused(done: "subprocess.CompletedProcess[bytes]") -> bool:
    """With a sentence, not with the trace of a panic."""
    return done.returncode == 1 and 0 < len(done.stderr) < 1000 and b"goroutine" not in done.stderr


def test_it_uses_the_standard_library_alone_and_is_short() -> None:
    assert not (SOURCE / "go.sum").exists()
    assert "require" not in (SOURCE / "go.mod").read_text()
    lines = 0
    for file in SOURCE.glob("*.go"):
        head, _, code = file.read_text().partition("\n)\n")
        assert all("." not in imported for imported in re.findall(r'"(.*)"', head))
        lines += sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("//"))
    assert lines <= CODE_LINES_MAX


def test_two_shares_open_every_key_of_an_archive(read: Reader, data: Data) -> None:
    done = read("archive", data.archive, data.shares)
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(" ", 1) for line in done.stdout.decode().splitlines())
    assert {key: listed[key] for key in data.key_ids} == {
        key: f"t-{number} thread active" for number, key in enumerate(data.key_ids)
    }


def test_an_altered_archive_or_share_is_refused(read: Reader, data: Data, tmp_path: Path) -> None:
    """Of the tags of the two root keys, the reader judges by that of its own."""
    content, share = data.archive.read_bytes(), data.shares.read_bytes()

    def refuses(changed: bytes) -> bool:
        (tmp_path / "archive").write_bytes(changed)
        return is_refused(read("archive", tmp_path / "archive", data.shares))

    places = [place for place in places_in(content) if place < len(content) - 64]
    assert all(
        refuses(changed) for changed in (*(altered(content, place) for place in places), content[:-1], content + b"\0")
    )
    assert [refuses(altered(content, len(content) - tag)) for tag in (64, 33, 32, 1)] in (
        [True, True, False, False],
        [False, False, True, True],
    )
    one = share.split(b"\n")[0]
    for changed in (altered(share, 10), altered(share, 100), one, one + b"\n" + one, b""):
        (tmp_path / "shares").write_bytes(changed)
        assert is_refused(read("archive", data.archive, tmp_path / "shares"))


def test_a_record_opens_at_its_place_alone(read: Reader, data: Data) -> None:
    place, other = (b64encode(aad).decode() for aad in (b"its place", b"another"))
    done = read("record", data.archive, data.shares, data.key_ids[0], place, given=data.record)
    assert (done.returncode, done.stdout) == (0, b"a record")
    for key, aad, sealed in (
        (data.key_ids[1], place, data.record),
        (data.key_ids[0], other, data.record),
        *((data.key_ids[0], place, altered(data.record, at)) for at in (0, 12, 24, len(data.record) - 1)),
        (data.key_ids[0], place, data.record[:30]),
    ):
        assert is_refused(read("record", data.archive, data.shares, key, aad, given=sealed))


@pytest.mark.parametrize(("name", "content"), [("empty", b""), ("full", LONG[:65536]), ("long", LONG)])
def test_a_stream_opens_whole_and_no_other_does(read: Reader, data: Data, name: str, content: bytes) -> None:
    sealed, command = data.streams[name], ("stream", data.archive, data.shares)
    done = read(*command, given=sealed)
    assert (done.returncode, done.stdout) == (0, content), done.stderr
    cut = [sealed[:-1], sealed + b"\0", sealed[: len(sealed) - len(sealed) % 65536]]
    for changed in (*cut, *(altered(sealed, place) for place in places_in(sealed, 12))):
        if changed != sealed:
            assert is_refused(read(*command, given=changed))


def test_a_log_and_its_tree_are_verified_and_one_other_byte_refused(read: Reader, data: Data, tmp_path: Path) -> None:
    content = (data.log / "minikms-audit.log").read_bytes()
    tree = [data.checkpoint, *data.note_keys]
    done = read("audit", data.log, data.public_key, *tree)
    assert done.returncode == 0, done.stderr
    lines = content.splitlines(keepends=True)
    assert done.stdout.startswith(b"lines 1 to %d, " % len(lines))
    copy = tmp_path / "minikms-audit.log"
    for place in places_in(content[:-SIG_BYTES]):
        copy.write_bytes(altered(content, place))
        done = read("audit", tmp_path, data.public_key)
        signed = re.search(rb"signed up to ([0-9]+)", done.stdout)
        # Another name for the type of the last signed line leaves that line, and those before it, unsigned.
        assert is_refused(done) or (signed and int(signed[1]) <= content[:place].count(b"\n"))
    for changed in (
        b"".join(lines[:3] + lines[4:]), b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]), content[:-1],
    ):  # fmt: skip
        copy.write_bytes(changed)
        assert is_refused(read("audit", tmp_path, data.public_key))
    for place in range(len(content) - SIG_BYTES, len(content), 5):
        copy.write_bytes(altered(content, place))
        assert is_refused(read("audit", tmp_path, data.public_key, *tree))
    copy.write_bytes(b"".join(lines[:-1]))
    assert is_refused(read("audit", tmp_path, data.public_key, *tree))
    assert is_refused(read("audit", data.log, b64encode(bytes(32)).decode()))


def test_a_receipt_and_its_proof_are_verified_and_one_other_byte_refused(
    read: Reader, data: Data, tmp_path: Path
) -> None:
    done = read("receipt", data.receipt, data.public_key, *data.note_keys)
    assert done.returncode == 0, done.stderr
    receipt: dict[str, Any] = json.loads(data.receipt.read_text())
    for member in ("line", "proof"):
        text = receipt[member].encode()
        sig = text.rindex(b'"sig"') if member == "line" else len(text)
        for place in places_in(text):
            if b"\xe2" in altered(text, place)[place - 2 : place + 3] or place >= sig:
                continue  # not UTF-8 any more; or SIG, which the tree alone covers
            changed = json.dumps(receipt | {member: altered(text, place).decode()})
            (tmp_path / "receipt").write_text(changed)
            assert is_refused(read("receipt", tmp_path / "receipt", data.public_key, *data.note_keys))
    (tmp_path / "receipt").write_text(json.dumps(receipt | {"more": 1}))
    assert is_refused(read("receipt", tmp_path / "receipt", data.public_key))


def test_a_quorum_that_has_not_cosigned_is_refused(read: Reader, data: Data) -> None:
    log, _, first, second = data.note_keys
    for keys in ([log, "1", first, first], [log, "3", first, second], [first, "1", second]):
        assert is_refused(read("audit", data.log, data.public_key, data.checkpoint, *keys))
    unknown = data.note_keys[2].replace("w1", "w9")
    assert is_refused(read("audit", data.log, data.public_key, data.checkpoint, log, "1", unknown))
