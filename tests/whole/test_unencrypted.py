"""The server without encryption: only a benchmark gets it, and what it stores is never taken for anything else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.client import ReencryptItem
from progressdb_server.config import Config, ConfigError, Kms, Server, Storage, load
from progressdb_server.store import directory, keyspace
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import FormatError
from progressdb_server.store.rocks.engine import RocksReader
from progressdb_server.unencrypted import MARK, VALUE, VARIABLE, UnencryptedProvider, check_allowed
from tests.harness import forked
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import with_store
from tests.progressdb_server.store.sealing_provider import SealingProvider, to_open, to_seal

PROJECT = Path(__file__).resolve().parents[2]
ASKED = {VARIABLE: VALUE}
TYPED = "xyzzy-typed-4d1a"
THREAD = "bench"


@pytest.fixture(scope="module")
def unencrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_server(Path(tmp_path_factory.mktemp("bare")), "--kms", "none", environment=ASKED) as started:
        yield started


@pytest.fixture(scope="module")
def encrypted_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server that was stopped. It had the variable, too, which by itself changes nothing."""
    with real_server(Path(tmp_path_factory.mktemp("sealed")), environment=ASKED) as server:
        assert server("POST", "/v1/messages", {"author": "ann", "thread": THREAD, "body": TYPED}).status == 200
        return server.db


def progressdb(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("progressdb_server", *words, env={**os.environ, **environment})


def refusal(db: Path, *words: str, addr: str = "127.0.0.1:0", **environment: str) -> str:
    """What a start says that is refused."""
    done = progressdb("--db", str(db), "--addr", addr, *words, **environment)
    assert done.returncode in (1, 2)
    return done.stderr


def files_of(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# --- how it is reached --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variables", [{}, {VARIABLE: ""}, {VARIABLE: "1"}, {VARIABLE: f"{VALUE} "}])
def test_without_the_variable_that_says_so_it_is_refused(tmp_path: Path, variables: dict[str, str]) -> None:
    said = refusal(tmp_path / "db", "--kms", "none", **variables)
    assert (
        f"stores everything in plaintext and is for benchmarks only: leave it out; for a benchmark set {VARIABLE}"
        in said
    )
    assert list(tmp_path.iterdir()) == []


def config_of(db: Path, address: str = "127.0.0.1", kms: Kms | None = None) -> Config:
    return Config(server=Server(address=address), storage=Storage(db_path=str(db)), kms=kms or Kms())


def reason(config: Config, environment: Mapping[str, str] = ASKED, *, has_master_key: bool = False) -> str:
    with pytest.raises(ConfigError) as refused:
        check_allowed(config, environment, has_master_key=has_master_key)
    return str(refused.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_on_a_loopback_address_in_a_new_directory_it_is_allowed(tmp_path: Path, address: str) -> None:
    check_allowed(config_of(tmp_path / "new", address), ASKED, has_master_key=False)
    check_allowed(config_of(tmp_path, address), ASKED, has_master_key=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "10.0.0.1", "192.0.2.7", "fe80::1", "localhost", "127.0.0.1.nip", ""]
)
def test_on_another_address_than_loopback_it_is_refused(tmp_path: Path, address: str) -> None:
    assert "serves this machine only" in reason(config_of(tmp_path, address))


def test_a_process_refuses_another_address_too(tmp_path: Path) -> None:
    assert "listen on 127.0.0.1 instead of 0.0.0.0" in refusal(tmp_path / "db", "--kms", "none", addr=":0", **ASKED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kms",
    [
        Kms(socket="/run/minikms.sock"),
        Kms(master_key_file="/etc/root.key"),
        Kms(data_dir="/srv/kms"),
        Kms(spawn=False),
        Kms(provider="local"),
        Kms(binary="/opt/minikms"),
        Kms(server_uids=(7,)),
    ],
)
def test_beside_any_setting_of_a_key_service_it_is_refused(tmp_path: Path, kms: Kms) -> None:
    assert "a key service or a root key is configured" in reason(config_of(tmp_path, kms=kms))


def test_beside_a_root_key_it_is_refused(tmp_path: Path) -> None:
    assert "a root key is configured" in reason(config_of(tmp_path), has_master_key=True)


def test_no_file_and_no_variable_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "progressdb.yaml"
    file.write_text("kms: {provider: none}\n")
    for flags, environment in (
        ({"config": str(file)}, {}),
        ({}, {"PROGRESSDB_KMS_PROVIDER": "none"}),
    ):
        with pytest.raises(ConfigError, match="Invalid enum value 'none'"):
            load({"storage.db_path": str(tmp_path), **flags}, {**ASKED, **environment})


def test_nothing_that_is_shipped_asks_for_it() -> None:
    shipped = [path for path in (PROJECT / "deploy").rglob("*") if path.is_file()]
    assert len(shipped) > 5
    for path in shipped:
        text = path.read_text("utf-8")
        assert VARIABLE not in text and "--kms" not in text, path


def test_a_server_that_encrypts_does_not_even_load_it() -> None:
    program = "import sys, progressdb_server.server, progressdb_server.cli.command as c; c.app.parse_args([]); "
    program += "print([name for name in sys.modules if name.endswith('unencrypted')])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "[]\n"


# --- whose directory it takes -------------------------------------------------------------------------------------
def test_an_encrypted_stores_directory_is_refused_and_left_as_it_is(encrypted_db: Path) -> None:
    before = files_of(encrypted_db)
    said = refusal(encrypted_db, "--kms", "none", **ASKED)
    assert "the store is encrypted, and `--kms none` would put plaintext into it: omit the flag" in said
    assert files_of(encrypted_db) == before
    assert not any(TYPED.encode() in content or MARK in content for content in before.values())


def test_a_directory_that_holds_anything_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kms").mkdir()
    assert "neither empty nor of an earlier benchmark: give --db a new directory" in reason(config_of(tmp_path))
    (tmp_path / "file").touch()
    assert "can't be read: Not a directory" in reason(config_of(tmp_path / "file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kms"]


def test_an_encrypting_server_refuses_an_unencrypted_directory(tmp_path: Path, unencrypted: RealServer) -> None:
    """It starts no key service, neither beside the server that made the directory nor after it."""
    with real_server(tmp_path, "--kms", "none", environment=ASKED) as server:
        pass
    said = refusal(server.db, "--dev")
    assert "nothing in this store is encrypted, because `progressdb --kms none` made it: use another directory" in said
    assert [path.name for path in server.db.iterdir()] == ["store"]
    assert "in use by another process" in refusal(unencrypted.db, "--dev")


@pytest.mark.parametrize("words", [("check",), ("check", "--repair"), ("backup", "create", "a")])
def test_the_commands_refuse_its_directory(tmp_path: Path, words: tuple[str, ...]) -> None:
    with real_server(tmp_path, "--kms", "none", environment=ASKED) as server:
        pass
    done = progressdb(*words, "--db", str(server.db))
    assert done.returncode in (1, 2)
    assert "nothing in this store is encrypted" in done.stderr
    assert [path.name for path in server.db.iterdir()] == ["store"]


def test_provider_and_store_are_always_of_one_kind() -> None:
    """Also where somebody composes the two otherwise than the server does."""
    bare, sealed = MemoryEngine(), MemoryEngine()
    directory.claim(bare, encrypted=False)
    directory.claim(sealed)
    assert bare.get(keyspace.FORMAT) == b'{"format":"unencrypted-1"}'

    async def nothing(store: Conversations) -> None:
        return None

    with_store(nothing, bare, UnencryptedProvider())
    with_store(nothing, sealed, SealingProvider())
    with pytest.raises(FormatError, match="nothing in this store is encrypted"):
        with_store(nothing, bare, SealingProvider())
    with pytest.raises(FormatError, match="would put plaintext into it"):
        with_store(nothing, sealed, UnencryptedProvider())


def test_a_record_of_the_one_kind_does_not_open_in_the_other() -> None:
    async def run() -> None:
        sealing, bare = SealingProvider(), UnencryptedProvider()
        key = (await sealing.create_dek_for_thread("t")).key_id
        [sealed] = await sealing.encrypt_batch([to_seal(key, b"text", b"aad", "t")])
        [plain] = await bare.encrypt_batch([to_seal(key, b"text", b"aad", "t")])
        assert isinstance(sealed, bytes) and isinstance(plain, bytes)
        assert len(sealed) == len(plain) == len(b"text") + api.SEAL_BYTES
        assert await bare.decrypt_batch([to_open(key, plain, b"aad", "t")]) == [b"text"]
        for provider, record in ((sealing, plain), (bare, sealed)):
            [refused] = await provider.decrypt_batch([to_open(key, record, b"aad", "t")])
            assert isinstance(refused, KmsRefusedError) and refused.code == api.CODE_DECRYPTION_FAILED
            own = sealed if provider is sealing else plain
            opens, refused_too = await provider.check_batch(
                key,
                [ReencryptItem(ciphertext=own, aad=b"aad"), ReencryptItem(ciphertext=record, aad=b"aad")],
                thread_id="t",
            )
            assert opens is None
            assert isinstance(refused_too, KmsRefusedError) and refused_too.code == api.CODE_DECRYPTION_FAILED

    asyncio.run(run())


# --- what it does -------------------------------------------------------------------------------------------------
def test_it_appends_and_lists_and_says_what_it_is(unencrypted: RealServer) -> None:
    for number in range(20):
        body = {"author": "ann", "body": {"text": TYPED, "n": number}}
        assert unencrypted("POST", f"/v1/threads/{THREAD}/messages", body).status == 200
    listed = unencrypted("GET", f"/v1/messages?thread={THREAD}").json["messages"]
    assert [message["body"] for message in listed] == [{"text": TYPED, "n": number} for number in range(20)]
    assert unencrypted("GET", f"/v1/threads/{THREAD}?author=ann").json["author"] == "ann"
    edited = unencrypted("PUT", f"/v1/messages/{listed[3]['id']}", {"author": "ann", "body": "edited"})
    assert edited.status == 200
    assert unencrypted("GET", f"/v1/messages/{listed[3]['id']}").json["body"] == "edited"
    warnings = [event["event"] for event in unencrypted.log if event["level"] == "warning"]
    assert warnings[0].startswith("NOTHING IS ENCRYPTED")


def test_it_starts_no_key_service_and_its_records_bear_the_mark(tmp_path: Path) -> None:
    with real_server(tmp_path, "--kms", "none", environment=ASKED) as server:
        assert server("POST", "/v1/messages", {"author": "ann", "thread": THREAD, "body": TYPED}).status == 200
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert children == []
    assert [path.name for path in server.db.iterdir()] == ["store"]
    reader = RocksReader(str(server.db / "store"))
    records = reader.scan(b"thread:", b"thread;", limit=10)
    reader.close()
    assert len(records) == 2
    assert all(MARK in record for _, record in records)
    assert any(TYPED.encode() in record for _, record in records)
    with real_server(tmp_path, "--kms", "none", environment=ASKED) as again:
        assert again("GET", f"/v1/messages?thread={THREAD}").json["messages"][0]["body"] == TYPED


def test_it_makes_no_backup_and_rotates_nothing(unencrypted: RealServer) -> None:
    body = {"author": "ann", "thread": "rotated", "body": TYPED}
    assert unencrypted("POST", "/v1/messages", body).status == 200
    backed_up = unencrypted("POST", "/admin/store_backup", {"name": "a"}, key=ADMIN)
    assert backed_up.status == 500
    [failed] = [event for event in unencrypted.log if event["event"] == "backup_failed"]
    assert "nothing in this store is encrypted" in failed["reason"]
    assert not (unencrypted.db / "backups").exists()
    unencrypted("POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": "rotated"}, key=ADMIN)
    assert {job["status"] for job in unencrypted("GET", "/admin/jobs", key=ADMIN).json["jobs"]} == {"failed"}
    assert unencrypted("GET", "/v1/messages?thread=rotated").json["messages"][0]["body"] == TYPED
