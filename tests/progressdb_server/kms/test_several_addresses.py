"""A message server with two addresses of the key service: it goes on after a switch, and shows which one serves."""

import shutil
from pathlib import Path

import pytest

from minikms.api.errors import StandbyError
from minikms.client import connecting
from progressdb_server.kms.provider import Fault, RemoteProvider, fault
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.logged import capture_logs
from tests.harness.message_server import ADMIN, server


def test_a_server_appends_and_reads_after_a_switch(tmp_path: Path) -> None:
    """The second daemon starts on a copy of the first one's directory, made once that was stopped."""
    bases = tmp_path / "a", tmp_path / "b"
    bases[0].mkdir()
    with LiveDaemon(bases[0], root=bytes(32)) as a:
        sockets = f"{a.socket},{bases[1] / 's'}"
        with server(tmp_path, {"KMS_SOCKET": sockets, "KMS_SPAWN": "0"}) as messages:

            def append(body: str) -> None:
                made = messages.ask("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": body})
                assert made.status in (200, 201), made

            def serving() -> bytes:
                page = messages.ask("GET", "/metrics", key=ADMIN).body
                return b"\n".join(line for line in page.split(b"\n") if line.startswith(b"progressdb_kms_serving"))

            append("before")
            assert f'{{address="{a.socket}"}} 1.0'.encode() in serving()
            a.stop()
            shutil.copytree(*bases, ignore=shutil.ignore_patterns("s"))
            with LiveDaemon(bases[1], root=bytes(32)) as b:
                append("after")
                listed = messages.ask("GET", "/v1/threads/t/messages").body["messages"]
                assert [message["body"] for message in listed] == ["before", "after"]
                words = ("status", "--url", f"http://127.0.0.1:{messages.port}")
                status = forked.run("progressdb_server", *words, env=messages.environ, cwd=tmp_path)
                assert (status.returncode, f"key service  ok: {b.socket}" in status.stdout) == (0, True), status


async def test_status_leaves_a_sealed_host_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with LiveDaemon(tmp_path / "a", "dev") as a, LiveDaemon(tmp_path / "b", "dev") as b:
        first, second = str(a.socket), str(b.socket)
        with a.client() as client:
            client.seal()
        with capture_logs() as logs:
            async with RemoteProvider(f"{first},{second}") as provider:
                assert (await provider.status()).status == "ok"
                assert provider.metrics.address == second
                with b.client() as client:
                    client.seal()
                assert (await provider.status()).status == "sealed"
            real = connecting.server_uid
            monkeypatch.setattr(connecting, "server_uid", lambda s: 9 if s.getpeername() == first else real(s))
            async with RemoteProvider(f"{first},{second}") as provider:
                await provider.status()
        assert {"event": "kms_address_changed", "address": second, "before": first, "log_level": "warning"} in logs
        assert [log for log in logs if f"{first} is served by uid 9" in log["event"]]


def test_a_standby_is_the_key_services_fault() -> None:
    assert fault(StandbyError()) is Fault.SERVICE
