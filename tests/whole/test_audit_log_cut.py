"""The message server remembers a line of its key service's audit log; the key service that it starts must have it."""

from pathlib import Path

import msgspec
import pytest

from minikms.api.base64 import encode_text
from minikms.audit import record
from minikms.platform.append_only import CONFIRMED_SUFFIX
from progressdb_server.store import keyspace
from progressdb_server.store.epoch import SeenState
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.api.real_server import real_server


def remember(store: Path, seq: int, sig: str) -> None:
    """As the server would have, had it seen that head some seconds ago."""
    engine = RocksEngine(str(store))
    raw = engine.get(keyspace.EPOCH)
    assert raw is not None
    known = msgspec.json.decode(raw, type=SeenState)
    changed = msgspec.structs.replace(known, head_seq=seq, head_sig=sig)
    engine.write([(keyspace.EPOCH, msgspec.json.encode(changed))])
    engine.sync()
    engine.close()


def test_a_key_service_that_lost_a_remembered_audit_line_does_not_start(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        assert server("POST", "/v1/messages", {"thread": "t", "author": "a", "body": 1}).status < 300
        store, log = next(server.db.rglob("CURRENT")).parent, next(server.db.rglob("minikms-audit.log"))
    lines = log.read_bytes().splitlines(keepends=True)
    seq = len(lines) - 2
    remember(store, seq, encode_text(record.split_line(lines[seq - 1][:-1])[1]))
    with real_server(tmp_path):
        pass
    log.write_bytes(b"".join(lines[: seq - 1]))
    log.with_name(log.name + CONFIRMED_SUFFIX).unlink()  # with it the key service itself would refuse the start
    with pytest.raises(AssertionError, match=rf"ends at line {seq - 1}, but line \d+ was written"):
        real_server(tmp_path).__enter__()
    with real_server(tmp_path, "--accept-restore"):
        pass
    with real_server(tmp_path):
        pass
