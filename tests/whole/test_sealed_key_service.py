"""A message server whose key service is sealed: what it says meanwhile, and that it goes on by itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms import Client, api
from progressdb_server.kms.provider import SEALED
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND
from tests.progressdb_server.api.real_server import RealServer, Reply, real_server
from tests.progressdb_server.api.sdk import TEST_S_MAX, ApiError, Sdk

WAIT_S_MAX = 60.0


@pytest.fixture
def kms(tmp_path: Path) -> Iterator[LiveDaemon]:
    (tmp_path / "kms").mkdir()
    (tmp_path / "server").mkdir()
    with LiveDaemon(tmp_path / "kms") as daemon:
        yield daemon


def variables(kms: LiveDaemon) -> dict[str, str]:
    return {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}


def post(server: RealServer) -> Reply:
    return server("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": 1})


def messages(server: RealServer) -> Reply:
    return server("GET", "/v1/threads/t/messages?author=ada")


def assert_sealed(reply: Reply) -> None:
    assert (reply.status, reply.json) == (503, {"error": SEALED}), reply
    assert int(reply.headers["retry-after"]) >= 1


def test_it_says_so_and_goes_on_after_the_unseal(tmp_path: Path, kms: LiveDaemon) -> None:
    with real_server(tmp_path / "server", environment=variables(kms)) as server, kms.client() as client:
        assert post(server).status == 200
        wait_until(lambda: server("GET", "/readyz", key=None).status == 200, seconds=WAIT_S_MAX)
        client.seal()
        for reply in (post(server), messages(server)):
            assert_sealed(reply)
            assert reply.headers["retry-after"] == str(api.SEALED_RETRY_SECONDS)
        wait_until(lambda: server("GET", "/readyz", key=None).status == 503, seconds=WAIT_S_MAX)

        def says_why() -> bool:
            """The last good answer of the key service counts for a moment, although writes are refused already."""
            reason = server("GET", "/admin/readiness", key=ADMIN).json
            assert reason["ready"] is False
            return bool(reason["key_service"].startswith("the key service is sealed"))

        wait_until(says_why, seconds=WAIT_S_MAX)
        assert server("GET", "/healthz", key=None).status == 200
        metrics = server("GET", "/metrics", key=ADMIN).body
        assert b'progressdb_kms_keys{state="active"} 1.0' in metrics, "as last seen"
        assert b"progressdb_kms_up 0.0" in metrics
        client.unseal()
        wait_until(lambda: post(server).status == 200, seconds=WAIT_S_MAX)
        assert len(messages(server).json["messages"]) == 2
        wait_until(lambda: server("GET", "/readyz", key=None).status == 200, seconds=WAIT_S_MAX)
        assert "kms_restored" not in {event["event"] for event in server.log}


def outdated_copy(tmp_path: Path, kms: LiveDaemon) -> Path:
    """Of the data directory: the server at `tmp_path` knows a later epoch of it. The key service is stopped."""
    older = tmp_path / "older"
    for number in range(4):  # the epoch rises with each start
        if number == 1:
            shutil.copytree(kms.data_dir, older)
        if number:
            kms.start()
        with real_server(tmp_path / "server", environment=variables(kms)) as server:
            assert post(server).status == 200
        kms.stop()
    return older


def test_an_older_key_service_behind_a_seal_at_runtime_gets_no_write(tmp_path: Path, kms: LiveDaemon) -> None:
    """The server sees the seal by one request. The data directory is replaced before the unseal."""
    older = outdated_copy(tmp_path, kms)
    kms.start()
    with real_server(tmp_path / "server", environment=variables(kms)) as server:
        with kms.client() as client:
            client.seal()
        assert_sealed(post(server))
        kms.stop()
        shutil.rmtree(kms.data_dir)
        older.rename(kms.data_dir)
        kms.start()

        def judged() -> bool:
            assert post(server).status == 503
            return "kms_restored" in {event["event"] for event in server.log}

        wait_until(judged, seconds=WAIT_S_MAX)
        reply = post(server)
        assert (reply.status, "older state" in reply.json["error"]) == (503, True)


def test_it_starts_while_the_key_service_is_sealed(tmp_path: Path, kms: LiveDaemon) -> None:
    with kms.client() as client:
        with real_server(tmp_path / "server", environment=variables(kms)) as server:
            assert post(server).status == 200
        client.seal()
        with real_server(tmp_path / "server", environment=variables(kms)) as server:
            assert_sealed(post(server))
            assert_sealed(messages(server))
            assert server("GET", "/readyz", key=None).status == 503
            client.unseal()
            wait_until(lambda: post(server).status == 200, seconds=WAIT_S_MAX)
            assert len(messages(server).json["messages"]) == 2


def test_an_older_key_service_behind_a_seal_is_refused(tmp_path: Path, kms: LiveDaemon) -> None:
    """It is judged after the unseal, before anything is written under its keys."""
    older = outdated_copy(tmp_path, kms)
    shutil.rmtree(kms.data_dir)
    older.rename(kms.data_dir)
    kms.start()
    with kms.client() as client:
        client.seal()
        with real_server(tmp_path / "server", environment=variables(kms)) as server:
            client.unseal()
            wait_until(lambda: "kms_restored" in {event["event"] for event in server.log}, seconds=WAIT_S_MAX)
            reply = post(server)
            assert (reply.status, "older state" in reply.json["error"]) == (503, True)


@pytest.mark.timeout(TEST_S_MAX)
def test_the_client_library_of_the_server_sees_what_is_wrong(tmp_path: Path, kms: LiveDaemon) -> None:
    with real_server(tmp_path / "server", environment=variables(kms)) as server, kms.client() as client:
        sdk = Sdk(f"http://127.0.0.1:{server.port}")
        try:
            backend = sdk(BACKEND)
            thread = backend.create_thread({"title": "T"}, author="ada")["id"]
            client.seal()
            with pytest.raises(ApiError, match=r"503.*the key service is sealed"):
                backend.create_message({"thread": thread, "body": 1}, author="ada")
            client.unseal()
            wait_until(lambda: server("GET", "/readyz", key=None).status == 200, seconds=WAIT_S_MAX)
            made = backend.create_message({"thread": thread, "body": 1}, author="ada")
            assert backend.list_messages(thread=thread)["messages"] == [made]
        finally:
            sdk.close()


def test_a_key_service_that_the_server_starts_stays_sealed_with_it(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        assert post(server).status == 200
        with Client(server.db / "run" / "minikms.sock") as client:
            client.seal()
    with real_server(tmp_path) as server:
        assert_sealed(post(server))
        with Client(server.db / "run" / "minikms.sock") as client:
            assert client.unseal_status().sealed
            client.unseal()
        wait_until(lambda: post(server).status == 200, seconds=WAIT_S_MAX)
