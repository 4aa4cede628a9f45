"""Makes `tests/vectors/release-VERSION.tar.xz`: what a release leaves on disk, and what must be read from it.

    python -m tests.vectors.make_release      # in a checkout of the release, once; needs PostgreSQL

Owns: what is in the archive. `data/` is the data directory of a sealed key service: a KEK that was rotated, a root key
that was removed, one in shares, keys of each purpose and state, a policy, an audit log with its tree in `auditor/`.
`killed/` is that of one that was killed. `db/` is a store with versions, deleted messages and threads, jobs, a backup;
beside it are a store dumped from PostgreSQL, an archive of keys, an encrypted file, and the answers that are expected.
Keys and times are new in each run, so an archive that was released is never made again. Its keys protect nothing.
`tests/whole/test_earlier_releases.py` reads each with the code of today.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from minikms.client import Client, MacItem
from tests import needs
from tests.harness import forked, postgres
from tests.harness.live_daemon import LiveDaemon
from tests.harness.message_server import ADMIN, Server, server
from tests.harness.postgres import url_of
from tests.harness.waiting import wait_until

VECTORS: Final = Path(__file__).parent
AAD: Final = b"where it is stored"
LISTS: Final = (("keys", "list"), ("kek", "list"), ("root", "list"))
SQL: Final = "postgres.sql"
STORE: Final = {"KMS_SPAWN": "0", "RETENTION_DELETED_AFTER": "never", "RETENTION_ROTATION_BACKUPS_AFTER": "never"}
"""Without removal by age: an archive grows old."""
POLICY: Final = """version = 1
[[grant]]
name = "everything"
principals = ["uid:UID"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy", "unseal", "ship"]
threads = ["*"]
limits = { decrypts_per_hour = 100000 }
"""
AUDITOR: Final = """version = 1
origin = "release.example/audit"
kms_socket = "BASE/run/s"
kms_server_uids = [UID]
log_dir = "BASE/audit"
state_dir = "BASE/auditor"
signers = ["file:BASE/signer.key"]
public_keys = ["PUBLIC_KEY"]
[[sink]]
type = "file"
name = "file"
path = "BASE/sink/lines"
"""


def say(*words: object) -> str:
    """What a command prints."""
    done = forked.run(*words)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def key_service(base: Path) -> LiveDaemon:
    """That of `data/`, started with the policy and the auditor's configuration of this user and place."""
    public_key = (base / "public_key").read_text()
    for name, text in (("policy/policy.toml", POLICY), ("auditor.toml", AUDITOR)):
        own = text.replace("UID", str(os.geteuid())).replace("BASE", str(base)).replace("PUBLIC_KEY", public_key)
        (base / name).write_text(own)
    (base / "audit").chmod(0o2750)
    (base / "run").mkdir(mode=0o755, exist_ok=True)
    flags = ("--audit-dir", str(base / "audit"), "--policy", str(base / "policy/policy.toml"))
    root = bytes.fromhex((base / "data.master-key").read_text())
    return LiveDaemon(base, "file", *flags, socket=base / "run/s", root=root)


@contextlib.contextmanager
def auditor(base: Path) -> Iterator[None]:
    """Runs until it has taken every line, at the end of the block."""
    config = f"--config={base / 'auditor.toml'}"
    with (base / "auditor.log").open("ab") as log:
        process = forked.start([sys.executable, "-m", "minikms_auditor", config], log, os.environ)

    def is_done() -> bool:
        found = forked.run("minikms_auditor", "status", config, "--json")
        status = json.loads(found.stdout or "{}")
        return bool(
            found.returncode == 0
            and status["position_seq"] == status["durable_seq"] == status["sinks"][0]["seq"]
            and status["size"] == status["published_size"]
        )

    try:
        yield
        wait_until(is_done)
    finally:
        process.terminate()
        process.wait()


def store_settings(daemon: LiveDaemon) -> dict[str, str]:
    return STORE | {"KMS_SOCKET": str(daemon.socket)}


@contextlib.contextmanager
def in_postgres(base: Path, settings: dict[str, str], sql: Path | None) -> Iterator[tuple[Server, str]]:
    """A server on a new database, which holds what the dump has, and the address of the database."""
    programs = needs.postgresql()
    with postgres.running() as (given, _):
        url = url_of(given)
        if sql is None:
            done = forked.run("progressdb_server", "store", "init", env=os.environ | {"PROGRESSDB_STORE_URL": url})
            assert done.returncode == 0, done.stderr
        else:  # psql of an older version complains of settings that only a newer one knows, and goes on
            subprocess.run([f"{programs}/psql", "-qX", "-f", sql, url], capture_output=True, check=True)
        (base / "beside").mkdir(exist_ok=True)
        with server(base / "beside", settings | {"STORE_URL": url, "STORE_SINGLE_NODE": "1"}) as made:
            yield made, url


def talk(asked: Server) -> list[str]:
    """Fills a store. The paths whose answers are kept."""

    def ask(method: str, path: str, body: object = None) -> Any:
        answer = asked.ask(method, path, body, key=ADMIN)
        assert answer.status in (200, 201, 202, 204), (path, answer)
        return answer.body

    threads = [ask("POST", "/v1/threads", {"title": f"thread {number}", "author": "ada"})["id"] for number in range(3)]
    messages = [
        ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": {"text": f"{number} of {thread}"}})[
            "id"
        ]
        for thread in threads
        for number in range(3)
    ]
    first, reply, gone = messages[:3]
    ask("PUT", f"/v1/messages/{first}", {"author": "ada", "body": {"text": "an edit"}})
    ask("POST", f"/v1/messages/{first}/reactions", {"id": "ada", "reaction": "+1"})
    ask("POST", "/v1/messages", {"thread": threads[0], "author": "ada", "body": "an answer", "reply_to": reply})
    ask("DELETE", f"/v1/messages/{gone}")
    ask("POST", f"/v1/threads/{threads[0]}/members", {"members": ["bob"]})
    ask("DELETE", f"/v1/threads/{threads[1]}")
    job = ask("POST", "/admin/rotate_thread_dek", {"thread_id": threads[0]})["job_id"]
    wait_until(lambda: ask("GET", f"/admin/jobs/{job}")["status"] == "done")
    return [
        *(f"/v1/threads/{thread}/messages?include_deleted=true" for thread in threads),
        f"/v1/messages/{messages[3]}",  # of the thread that is deleted
        f"/v1/messages/{first}/versions",
        f"/v1/messages/{first}/reactions",
        f"/v1/threads/{threads[0]}/members",
        "/v1/threads?author=ada",
        "/admin/stats",
        f"/admin/jobs/{job}",
    ]


def answers(asked: Server, paths: list[str]) -> dict[str, Any]:
    found = {path: asked.ask("GET", path, key=ADMIN) for path in paths}
    return {path: {"status": answer.status, "body": answer.body} for path, answer in found.items()}


def use_keys(kms: Client, expected: dict[str, Any]) -> None:
    """Keys of every purpose and state, under two KEKs, and a root key that was removed."""
    made = {name: kms.create_dek_for_thread(f"of-{name}").key_id for name in ("active", "retired", "destroyed")}
    sealed = {name: kms.encrypt(key, name.encode(), aad=AAD) for name, key in made.items()}
    kms.decrypt(made["active"], sealed["active"], aad=AAD)
    made["next"] = kms.create_dek_for_thread("of-retired", replaces=made["retired"]).key_id
    spare = kms.add_root(os.urandom(32).hex(), provider="file").slot_id
    kms.rotate_kek()
    kms.remove_root(spare)
    wait_until(lambda: all(root.state == "active" for root in kms.list_roots().roots))
    sealed["next"] = kms.encrypt(made["next"], b"next", aad=AAD)
    kms.retire_key(made["destroyed"])
    kms.destroy_key(made["destroyed"])
    mac = kms.create_dek_for_thread("of-macs", purpose="mac").key_id
    expected |= {
        "keys": made,
        "sealed": {name: b64encode(content).decode() for name, content in sealed.items()},
        "mac": [mac, kms.mac(mac, [MacItem(plaintext=b"text", aad=AAD)])[0].hex()],
    }


def make(base: Path) -> None:
    """Everything below `base`, an empty directory that other users can enter."""
    expected: dict[str, Any] = {}
    for directory in ("policy", "sink"):
        (base / directory).mkdir()
    (base / "audit").mkdir()
    (base / "audit").chmod(0o2750)
    (base / "signer.key").touch(0o600)
    (base / "signer.key").write_text(os.urandom(32).hex())
    own = ("--data-dir", base / "data", "--master-key-file", base / "data.master-key")
    shares = ("--recovery-shares", "2/3", "--shares-dir", base / "shares", "--audit-dir", base / "audit")
    made = json.loads(say("minikms", "init", *own, *shares, "--json"))
    (base / "public_key").write_text(made["audit_public_key"])
    say("minikms", "pin", "add", f"file:{base / 'data.master-key'}", "--pin", base / "pin", "--data-dir", base / "data")
    say("minikms_unlock", "init-passphrase", "--config", base / "passphrase.toml")

    with key_service(base) as daemon, daemon.client() as kms:
        with auditor(base):
            use_keys(kms, expected)
            (base / "note").write_text("the door code is 4711")
            at = ("--socket", daemon.socket)
            say("minikms", "encrypt", base / "note", *at)
            (base / "note").unlink()
            with server(base, store_settings(daemon)) as asked:
                paths = talk(asked)
                asked.ask("POST", "/admin/store_backup", {"name": "monday"}, key=ADMIN)
                expected["store"] = answers(asked, paths)
            with in_postgres(base, store_settings(daemon), None) as (asked, url):
                expected["postgres"] = answers(asked, talk(asked))
                dump = [f"{needs.postgresql()}/pg_dump", "-O", url]
                (base / SQL).write_bytes(subprocess.run(dump, stdout=subprocess.PIPE, check=True).stdout)
            say("minikms", "backup", "create", base / "keys.minikms", *own)
            for words in LISTS:
                expected[" ".join(words)] = listed = json.loads(say("minikms", *words, "--json", *at))
                for root in listed.get("roots", ()):  # an unseal changes the others
                    root.pop("in_use")
                    root.pop("tested_at", "")
        kms.seal()
    killed = base / "killed"
    killed.mkdir()
    with LiveDaemon(killed) as daemon, daemon.client() as kms:
        key = kms.create_dek_for_thread("killed").key_id
        expected["killed"] = [key, b64encode(kms.encrypt(key, b"killed")).decode()]
    (base / "expected.json").write_text(json.dumps(expected, indent=1))
    for left in ("beside", "run", "auditor.toml", "policy/policy.toml"):
        shutil.rmtree(base / left) if (base / left).is_dir() else (base / left).unlink()


def pack(base: Path, archive: Path) -> None:
    """Files and directories alone, without the machine's users and times."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(base.rglob("*")):
            if not (path.is_file() or path.is_dir()) or path.name in ("log", "LOG", "server-log", "auditor.log"):
                continue
            entry = tar.gettarinfo(path, str(path.relative_to(base)))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            if path.is_file():
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
    archive.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    archive = VECTORS / f"release-{version('progressdb-minikms')}.tar.xz"
    with tempfile.TemporaryDirectory(prefix="release-") as made:
        base = Path(made)
        base.chmod(0o755)
        make(base)
        pack(base, archive)
    print(f"{archive.stat().st_size:,} bytes: {archive}")


if __name__ == "__main__":
    main()
