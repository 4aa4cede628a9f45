"""A server whose store has a damaged block: what it still serves, what it says of it, and how it is repaired."""

import contextlib
import os
from pathlib import Path

from progressdb_server.store.model import StoreDamagedError
from progressdb_server.store.rocks.engine import LEVEL_ZERO_FILES, RocksEngine
from progressdb_server.store.rocks.salvage import DAMAGED
from tests.harness import forked
from tests.harness.disk_faults import flip
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.real_server import RealServer, real_server

THREADS = 80


def command(server: RealServer, *words: str) -> tuple[int, str]:
    environment = {"PROGRESSDB_API_ADMIN_KEYS": ADMIN, "PROGRESSDB_DB_PATH": str(server.db)}
    done = forked.run("progressdb_server", *words, env=environment)
    return done.returncode, done.stdout + done.stderr


def lists(server: RealServer) -> dict[str, int]:
    return {
        thread: server("GET", f"/v1/threads/{thread}/messages?author=ada").status
        for thread in (f"t{number}" for number in range(THREADS))
    }


def test_one_damaged_block_leaves_the_other_threads_served(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        for number in range(THREADS):
            sent = {"thread": f"t{number}", "author": "ada", "body": "x" * 1000}
            assert server("POST", "/v1/messages", sent).status == 200
        status, said = command(
            server, "backup", "create", "good", "--store-only", "--url", f"http://127.0.0.1:{server.port}"
        )
        assert (status, "each block was read back" in said) == (0, True), said
        status, said = command(server, "backup", "verify", str(server.db / "backups" / "good"), "--db", str(server.db))
        assert (status, f"{2 * THREADS} of {2 * THREADS} records were opened" in said) == (0, True), said
    store = server.db / "store"
    engine = RocksEngine(str(store))
    engine.compact()
    engine.close()
    (table,) = store.glob("*.sst")
    content = table.read_bytes()
    flip(table, content.index(b":msg:", len(content) // 2))

    with real_server(tmp_path) as server:
        found = lists(server)
        assert set(found.values()) == {200, 500}
        assert list(found.values()).count(200) > THREADS / 2
        damaged = next(thread for thread, status in found.items() if status == 500)
        reply = server("GET", f"/v1/threads/{damaged}/messages?author=ada")
        assert reply.json == {"error": f"the store is damaged: the file {table.name}"}
        assert "retry-after" not in reply.headers
        assert any(event["event"] == "store_damaged" and table.name in event["reason"] for event in server.log)
        assert server("GET", "/readyz", key=None).json == {"status": "damaged"}
        assert b"progressdb_store_damaged_files 1.0" in server("GET", "/metrics", key=ADMIN).body
        status, said = command(server, "doctor", "--url", f"http://127.0.0.1:{server.port}")
        assert (status, f"degraded: store_damaged: the store is damaged: {table.name}" in said) == (1, True), said
        status, said = command(server, "backup", "create", "one", "--url", f"http://127.0.0.1:{server.port}")
        assert status != 0
        assert not (server.db / "backups" / "one").exists()
        assert server("POST", "/v1/messages", {"thread": "new", "author": "ada", "body": 1}).status == 200
        status, said = command(server, "check")
        assert (status, table.name in said, "--drop-damaged" in said) == (1, True, True), said

    # RocksDB meets the block in the background once it has to merge files.
    for number in range(LEVEL_ZERO_FILES):
        engine = RocksEngine(str(store))
        with contextlib.suppress(StoreDamagedError):  # once there are enough
            engine.write([(b"backup:migrate:", b"%d" % number), (b"thread:u:meta", None)])
        engine.close()

    with real_server(tmp_path) as server:
        refused = [
            server("POST", "/v1/messages", {"thread": f"new{number}", "author": "ada", "body": 1})
            for number in range(50)
        ][-1]
        assert refused.status == 503
        assert refused.json["error"].startswith(f"the store is damaged: the file {table.name}: nothing is written")
        assert "progressdb check --repair --drop-damaged" in refused.json["error"]
        assert server("GET", "/readyz", key=None).status == 503
        assert lists(server) == found
        status, said = command(server, "doctor", "--url", f"http://127.0.0.1:{server.port}")
        assert (status, f"{table.name}: nothing is written" in said) == (1, True), said
    with real_server(tmp_path) as server:
        assert lists(server) == found
    status, said = command(server, "check", "--repair")
    assert (status, "--drop-damaged" in said) == (1, True), said
    status, said = command(server, "check", "--repair", "--drop-damaged")
    assert f"dropped: {table.name}: the file is damaged" in said, said
    assert (server.db / f"store{DAMAGED}1").exists()
    engine = RocksEngine(str(store))
    altered, raw = next(entry for entry in engine.scan(b"thread:new:msg:", b"thread:new:msg;", limit=1))
    engine.write([(altered, raw[:-1] + bytes([raw[-1] ^ 1]))])
    engine.close()
    with real_server(tmp_path) as server:
        repaired = lists(server)
        assert {thread for thread, status in found.items() if status == 200} <= {
            thread for thread, status in repaired.items() if status == 200
        }
        assert 500 not in repaired.values()
        assert server("GET", "/readyz", key=None).json == {"status": "ok"}
        message = "msg-" + altered.decode().rpartition(":")[2].lstrip("0")
        reply = server("GET", f"/v1/messages/{message}?author=ada")
        assert (reply.status, altered.decode() in reply.json["error"]) == (500, True), reply
        assert server("GET", "/readyz", key=None).json == {"status": "damaged"}
        assert b"progressdb_store_unreadable_records 1.0" in server("GET", "/metrics", key=ADMIN).body
        assert altered.decode() in server("GET", "/admin/readiness", key=ADMIN).json["damage"]
        assert server("POST", "/v1/messages", {"thread": "new", "author": "ada", "body": 1}).status == 200
    table = max(store.glob("*.sst"), key=lambda file: file.stat().st_size)
    os.truncate(table, table.stat().st_size // 2)
    status, said = command(server, "--dev", "--addr", "127.0.0.1:0")
    assert (status, f"the file {table.name}" in said, "in the runbook" in said) == (2, True, True), said
